"""Noise schedules, samplers, sampling, nets, and the loading of pretrained models."""
