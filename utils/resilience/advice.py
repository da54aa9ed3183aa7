"""Advice about two errors: too little memory, and a lost process."""

import os
import re

CONNECTION_ERRORS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Socket closed",
    "Connection closed by remote peer",  # these three come from NCCL
    "remote process exited",
    "NCCL communicator was aborted",
)


def lost(error: Exception) -> str | None:
    """Return an explanation if a collective operation failed because another process was lost; None otherwise."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not isinstance(error, RuntimeError):
        return None
    if not any(words in str(error) for words in CONNECTION_ERRORS):
        return None
    reason = re.sub(r"\[\S*/[\w.]+:\d+\] *", "", _first_line(error))  # without the location in torch's source
    address = re.search(r"\[([\d.]+|[\da-f:]+)\]:\d+", reason)
    where = f", at {address[1]}," if address else ""
    return (
        f"another process of this run{where} has ended or cannot be reached. Its own message is above, or in "
        f"its machine's log. The same command resumes from the newest checkpoint ({reason})"
    )


def memory(error: Exception, flags: dict) -> str | None:
    """Return advice if there was too little memory; None otherwise.

    The advice names flags to change, with values that keep the number of images per optimizer step.
    """
    import torch

    # On a CPU torch raises a plain RuntimeError
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "DefaultCPUAllocator" not in str(error):
        return None
    advice = []
    batch, sampled = flags.get("train_batch_size", 1), flags.get("sample_batch_size", 1)
    if batch > 1:
        smaller = next(size for size in range(batch // 2, 0, -1) if batch % size == 0)
        micro_steps = flags["gradient_accumulation_steps"] * batch // smaller
        advice.append(
            f"--train_batch_size {smaller} --gradient_accumulation_steps {micro_steps} (each optimizer step has "
            "the same images and the same result)"
        )
    if flags.get("gradient_checkpointing") is False:
        advice.append("--gradient_checkpointing")
    if sampled > 1:
        advice.append(f"--sample_batch_size {sampled // 2} if it happened while samples were drawn")
    if isinstance(error, torch.OutOfMemoryError) and flags.get("cache_images", "never") != "never":
        advice.append("--cache_images never if the images are cached in the memory of the GPU")
    advice.append("a smaller --resolution" if "resolution" in flags else "a smaller model")
    first_line = _first_line(error) if str(error) else "Out of memory."
    return f"{first_line} Repeat the command with {', or '.join(advice)}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
