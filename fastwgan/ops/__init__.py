"""The ops, a family to a file: the public function, its derivative, its launch, and the launch that a trainer makes."""
