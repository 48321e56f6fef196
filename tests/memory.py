"""How much memory a function takes at its peak, as torch's allocator sees it."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def peak_memory(run: Callable[[], object]) -> int:
    """The most bytes of tensors that were held at once while a function ran, above those before.

    On a processor every allocation is read from torch's profiler, so that two runs agree to the
    byte, which the process's resident size never does. On CUDA it is the allocator's own peak.

    Args:
        run: the function; it should have run before, so that what is made once is not counted.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler chatters on standard error
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    if not changes:
        return 0
    first = min(changes, key=lambda change: change["ts"])["args"]
    before = first["Total Allocated"] - first["Bytes"]
    peak = max(change["args"]["Total Allocated"] for change in changes)
    return max(0, int(peak - before))
