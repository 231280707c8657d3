"""One step of a trainer on the user's networks, judged against float64."""
