"""Decoding, preparation and batching of images, in an order that follows from the seed."""
