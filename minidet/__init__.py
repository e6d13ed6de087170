"""minidet: RetinaNet built from the array up."""
