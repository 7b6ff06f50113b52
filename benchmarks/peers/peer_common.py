"""What the peer scripts share. They run in environments of their own, so nothing here imports more than the standard library."""

import argparse
import importlib.metadata
import json
import time

# The model of the speed benchmarks: 6.4 M parameters in the shape of Qwen2.
HIDDEN, LAYERS, HEADS, KV_HEADS, MLP, VOCAB = 256, 6, 4, 2, 1024, 2048


def arguments(description, **defaults):
    """Command line with one integer flag for each default."""
    parser = argparse.ArgumentParser(description=description)
    for name, value in defaults.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    return parser.parse_args()


def timed(call, repeats):
    """(seconds of the first call beyond the median of the others, best and median seconds of the `repeats` calls after it)."""
    first = seconds(call)
    rest = sorted(seconds(call) for _ in range(repeats))
    middle = rest[len(rest) // 2]
    return max(0.0, first - middle), rest[0], middle


def seconds(call):
    """Wall seconds of a call that returns when its work is done."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def emit(package, value, unit, compile_s, **more):
    """Prints the result as one JSON object on the last line."""
    version = importlib.metadata.version(package)
    print(json.dumps({"value": value, "unit": unit, "compile_s": compile_s, "peer": f"{package} {version}", **more}), flush=True)
