"""Diffusion itself: noise schedules, samplers, sampling, nets, and models that come from elsewhere."""
