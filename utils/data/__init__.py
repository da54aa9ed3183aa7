"""From images to batches: decoded once or as they come, prepared, and in an order that follows from the seed."""
