"""One reading of one case, in a process of its own: python -m flexattn_jax.costs.measure < order.json > reading.json.

A fresh process finds nothing traced, lowered or compiled before. What this process prints is one JSON object; `lab.py`
starts it, with the environment that the target's compiler needs, and knows what to do when it is late or dies.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

from flexattn_jax.config import ConfigError
from flexattn_jax.costs.targets import MissingCompiler, Target, open_devices, parse_target

OK, NO_ROOM, FAILED, LATE, MISSING = "ok", "does not fit", "failed", "time limit", "compiler missing"
STATUSES = (OK, NO_ROOM, FAILED, LATE, MISSING)


def measure(order: dict[str, Any]) -> dict[str, Any]:
    """Traces, lowers and compiles a case.

    Args:
      order: `case` (fields of Case), `fit` (those of programs.Fit: a step to compile in place of the case's program),
        `cache` (folder of the persistent compilation cache, or None: it is off), `details` (False: seconds only),
        `steps` (runs to time where the target can run).

    Returns:
      `status`, `message` where it is not OK, `seconds`, `host_peak_bytes` and whether the program was `cached`, and
      with details the counts and estimates; see docs/compile_costs.md.
    """
    from flexattn_jax.costs.cases import Case, compiler_options
    from flexattn_jax.costs.programs import Fit, build, fit_program

    case = Case(**order["case"])
    target = parse_target(case.target)
    hits = _set_cache(order["cache"])
    try:
        devices = open_devices(target)
    except MissingCompiler as error:
        return {"status": MISSING, "message": str(error)}
    except ConfigError as error:
        return {"status": FAILED, "message": str(error)}
    program = fit_program(Fit(**order["fit"]), devices) if "fit" in order else build(case, devices)

    clock = [time.perf_counter()]
    traced = program.trace(case.ranking)
    clock.append(time.perf_counter())
    lowered = traced.lower()
    clock.append(time.perf_counter())
    reading: dict[str, Any] = {"status": OK} | program.notes
    compiled = None
    try:
        compiled = lowered.compile(compiler_options=compiler_options(case) or None)
    except Exception as error:  # whatever a compiler raises belongs into the table
        reading |= {"status": NO_ROOM if "RESOURCE_EXHAUSTED" in str(error) else FAILED, "message": _sentence(error)}
    clock.append(time.perf_counter())
    reading["cached"] = bool(hits)
    reading["seconds"] = {
        name: end - start for name, start, end in zip(("trace", "lower", "compile"), clock, clock[1:], strict=False)
    }
    # Read before anything below takes memory of its own.
    reading["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if order["details"]:
        reading |= details(case, target, program, lowered, compiled, len(devices))
    if order["steps"] and compiled is not None and target.runs_here:
        reading |= _run(program, compiled, order["steps"])
    return reading


def details(case: Any, target: Target, program: Any, lowered: Any, compiled: Any, devices: int) -> dict[str, Any]:
    """What the lowered and the compiled program tell."""
    from flexattn_jax.costs import stablehlo
    from flexattn_jax.costs.estimate import estimate, estimated_seconds, roofline_seconds

    counts = stablehlo.count(lowered, program.assumed)
    found = {
        "analytic_flops": program.analytic_flops,
        "assumption": program.assumption,
        "devices": 1 if case.system == "none" else devices,
        "stablehlo": counts.to_dict() | {"bytes": len(lowered.as_text())},
    }
    if compiled is None:
        return found
    sizes, text, xla = compiled.memory_analysis(), compiled.as_text(), compiled.cost_analysis() or {}
    totals = estimate(text, program.assumed)
    seconds = estimated_seconds(totals, target.chip)
    if totals.data_loops != counts.data_loops:
        # The compiler changed loops beyond recognition: better no estimate than a wrong one.
        seconds = None
    return found | {
        "memory": {
            "arguments": sizes.argument_size_in_bytes,
            "outputs": sizes.output_size_in_bytes,
            "aliased": sizes.alias_size_in_bytes,
            "temporary": sizes.temp_size_in_bytes,
            "peak": sizes.argument_size_in_bytes
            + sizes.output_size_in_bytes
            - sizes.alias_size_in_bytes
            + sizes.temp_size_in_bytes,
        },
        "executable_bytes": _executable_bytes(compiled, sizes),
        "xla_flops_body_once": xla.get("flops"),
        "xla_bytes_body_once": xla.get("bytes accessed"),
        "hlo": totals.to_dict() | {"bytes": len(text)},
        "estimated_seconds": seconds,
        "roofline_seconds": roofline_seconds(counts.flops / found["devices"], totals.hbm_bytes, target.chip),
    }


def _set_cache(folder: str | None) -> list[str]:
    """Turns the persistent cache on or off; the list that it returns grows with each program that the cache had."""
    import jax

    hits: list[str] = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None
    )
    jax.config.update("jax_enable_compilation_cache", folder is not None)
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return hits


def _run(program: Any, compiled: Any, steps: int) -> dict[str, Any]:
    """Seconds of each of `steps` runs with random arguments, after one that is not counted."""
    import jax

    donated = [leaf.donated for leaf in jax.tree.leaves(compiled.args_info)]
    seconds = []
    try:
        arguments = _random_arguments(program.arguments)
        for _ in range(steps + 1):
            leaves, tree = jax.tree.flatten(arguments)
            leaves = [leaf.copy() if gone else leaf for leaf, gone in zip(leaves, donated, strict=True)]
            given = jax.block_until_ready(jax.tree.unflatten(tree, leaves))
            start = time.perf_counter()
            jax.block_until_ready(compiled(*given))
            seconds.append(time.perf_counter() - start)
    except Exception as error:
        return {"step_message": _sentence(error)}
    return {"step_seconds": seconds[1:]}


def _random_arguments(shapes: Any) -> Any:
    """Arrays in the given shapes and shardings: small normal weights, small ids, lengths that fill the sequence."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    normal = 0.02 * np.random.default_rng(0).standard_normal(2**20 + 1, np.float32)  # repeated, out of step with rows

    def draw(path: Any, leaf: Any) -> Any:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        name = getattr(path[-1], "name", getattr(path[-1], "key", ""))
        if leaf.dtype == bool:
            value = np.full(leaf.shape, name != "projected")
        elif jnp.issubdtype(leaf.dtype, jnp.floating):
            value = np.resize(normal, leaf.shape).astype(leaf.dtype)
        else:
            value = np.full(leaf.shape, _LENGTH if name == "lengths" else 1, leaf.dtype)
        return jax.device_put(value, leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, shapes)


_LENGTH = 8  # tokens of an option, and positions before a decoding step: any value costs the same


def _executable_bytes(compiled: Any, sizes: Any) -> int | None:
    """Size of the machine code; where the back end does not tell, of the serialised executable."""
    if sizes.generated_code_size_in_bytes:
        return sizes.generated_code_size_in_bytes
    try:
        return len(compiled.runtime_executable().serialize())
    except Exception:  # a back end that cannot be serialised has no size to tell
        return None


def _sentence(error: BaseException) -> str:
    """The first lines of a compiler's message, in one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:600] or type(error).__name__


def main() -> None:
    """Reads an order, prints a reading."""
    order = json.load(sys.stdin)
    # Compilers print to the standard output what belongs to the error output.
    result, sys.stdout = os.dup(1), sys.stderr
    os.dup2(2, 1)
    reading = measure(order)
    with os.fdopen(result, "w") as out:
        json.dump(reading, out)


if __name__ == "__main__":
    main()
