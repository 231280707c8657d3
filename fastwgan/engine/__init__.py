"""The parts of a trainer."""
