"""The counted heap sees what a call allocates, also on other threads and also when freed again."""

from __future__ import annotations

import json

from bench.memory import run_counted

SCRIPT = """
import json
import threading
import torch
from bench.memory import counted_heap, peak_extra_bytes

def on_a_thread(x):
    thread = threading.Thread(target=lambda: torch.empty(3_000_000))
    thread.start()
    thread.join()

def freed_before_the_next(x):
    for _ in range(3):
        torch.empty(1_000_000)

calls = [lambda x: None, torch.clone, lambda x: x + x.sin(), freed_before_the_next, on_a_thread]
x = torch.ones(2_000_000)
for call in calls:
    call(x)
print(json.dumps([peak_extra_bytes(counted_heap(), call, x) for call in calls]))
"""


def test_peaks() -> None:
    peaks = json.loads(run_counted("-c", SCRIPT))
    megabytes = [round(peak / 1e6, 1) for peak in peaks]
    assert megabytes == [0.0, 8.0, 16.0, 4.0, 12.0]
