"""Counts what the compiled CUDA and Triton kernels take of a GPU that is not here, from their machine code.

    python benchmarks/sass_audit.py --out benchmarks/results/sass_audit.json      compile, count, write
    python benchmarks/sass_audit.py --check [--cubins FOLDER]                     fail where a main loop became worse

A main loop is an innermost loop with tensor-core instructions. Counts are facts. The bounds in microseconds are estimates: of
the products alone, as if each multiprocessor issued an instruction per cycle and partition, all the time, with no tail and no
wait; the floor is that of the bytes that any implementation moves. `--check` compiles only Triton kernels that are not those of
the file, and no CUDA kernels: it takes the files that ``tests/kernels/native/resources.py --keep FOLDER`` left. Needs Triton,
nvcc (to write) and timm (to write), no GPU.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels" / "native"))

import sass
from roofline import PASSES, minimum_bytes, products

from orepa.bench.machine import environment
from orepa.bench.problem import Problem, Shape, SqueezeCase
from orepa.bench.tables import render

Row = dict[str, Any]

BENCHMARK = "sass_audit"
RESULTS = Path(__file__).resolve().parent / "results" / "sass_audit.json"

#: multiprocessors, GHz, bytes per second of memory, TF32 multiply-adds per cycle of a multiprocessor, threads and KiB of shared
#: memory in one: the vendor's numbers for A100, H200, B200 and RTX PRO 6000
GPUS: dict[str, tuple[int, float, float, int, int, int]] = {
    "sm_80": (108, 1.41, 2.0e12, 512, 2048, 164),
    "sm_90": (132, 1.83, 4.8e12, 1024, 2048, 228),
    "sm_100": (148, 1.85, 8.0e12, 1024, 2048, 228),
    "sm_120": (188, 2.6, 1.79e12, 128, 1536, 100),
}
#: what users run: the kernel's dtype, whether parameters are contiguous, Triton's precision
PATHS: dict[str, tuple[str, bool, str]] = {
    "autocast": ("bf16", False, "rounded"),
    "fp32": ("fp32", False, "tf32x3"),
    "autocast, contiguous": ("bf16", True, "rounded"),
    "fp32, contiguous": ("fp32", True, "tf32x3"),
}
#: topology and kernel size of the structures whose tiles are compiled
STRUCTURES = (("orepa", 3), ("rep1x1", 1))
CHANNELS = (64, 128, 256, 512)
MODES = ("forward", "backward")
#: what names a kernel
KEY = ("provider", "gpu", "mode", "path", "block", "tile")
#: what the tables show
SHOWN = ("sm_80", "sm_90")
#: slots of a CUDA step of two rounds of the product loop that are not in it, of tile loads and control: counted by hand in the
#: forward kernel, along the path that channels_last takes
CUDA_STEP = 193
#: a main loop may take so many times the slots of the committed one, for compilers' moods
MARGIN = 1.02


# --- kernels --------------------------------------------------------------------------------------------------------------


def triton_rows(known: dict[str, Row]) -> Iterator[Row]:
    """Yield every Triton kernel; those whose digest is in ``known`` as they are there."""
    import triton_aot as aot

    from orepa_kernels.backends.triton import launcher as launch

    for gpu, path, mode, block in itertools.product(GPUS, PATHS, MODES, STRUCTURES):
        if "contiguous" in path and gpu not in SHOWN:
            continue
        spec, choices = _tiles(gpu, path, mode, *block)
        for config in dict.fromkeys(choices):
            constants, options = launch.kernel_arguments(config, spec, PATHS[path][2])
            function = aot.squeeze_forward if mode == "forward" else aot.squeeze_backward
            source = aot.source_of(function, spec, constants)
            digest = aot.digest_of(source, gpu, options)
            if digest not in known:
                compiled, log = aot.compile_with_report(source, gpu, options)
                known[digest] = _triton_row(gpu, compiled, aot.usage(log), config, 3 if PATHS[path][0] == "fp32" else 1)
            names = {"provider": "triton", "gpu": gpu, "mode": mode, "path": path, "block": _block(*block)}
            yield names | {"tile": _text(config), "digest": digest} | known[digest]


@functools.cache
def _tiles(gpu: str, path: str, mode: str, topology: str, size: int) -> tuple[Any, Any]:
    """Return a structure, and Triton's tiles for it."""
    import triton_aot as aot

    from orepa_kernels.backends.triton import configs

    dtype, contiguous, precision = PATHS[path]
    (forward, backward), *_ = aot.structures(topology, size, contiguous=contiguous, autocast=dtype != "fp32")
    rest = aot.TARGETS[gpu].arch, precision
    if mode == "forward":
        return forward, configs.forward_choices(forward, *rest)
    return backward, configs.backward_choices(backward, *rest)


def _triton_row(gpu: str, compiled: Any, usage: tuple[int, int], config: Any, count: int) -> Row:
    """Return what was compiled, with ``count`` TF32 products for each one needed."""
    (kernel,) = sass.kernels(compiled.asm["cubin"])
    roles = {"": (config.BO * config.TAPS, config.BI, config.BM)}  # rows, columns and depth of a step
    if "FM" in asdict(config):
        second = config.BO * config.TAPS, config.BM, config.BI
        roles = {"second": second, "first": (config.FM, config.FI, config.FO)}
    needed = [math.prod(shape) / config.num_warps for shape in roles.values()]
    loops = []
    for loop, macs, (role, (rows, columns, _)) in zip(_in_order(kernel, needed), needed, roles.items(), strict=False):
        traffic = 9 * 512**3 * 4 * (1 / rows + 1 / columns) / 1e6
        per = {"macs_per_slot": round(macs / loop.slots, 1), "redundant": round(loop.macs / macs / count, 2)}
        loops.append({"role": role, **per, "mb": round(traffic), **asdict(loop)})
    used = _occupancy(gpu, usage[0], compiled.metadata.shared, 32 * config.num_warps)
    return used | {"spilled": usage[1], "loops": loops, "rest": asdict(kernel.rest)}


def _in_order(kernel: sass.Kernel, needed: list[float]) -> tuple[sass.Part, ...]:
    """Return the main loops in the order of their roles, by the products that those take in one step; none if in doubt."""
    if len(kernel.loops) != len(needed):  # a pipelined loop in two parts, on Blackwell
        return ()

    def misfit(order: tuple[sass.Part, ...]) -> float:
        return sum(abs(math.log(max(1, loop.macs) / macs)) for loop, macs in zip(order, needed, strict=True))

    return min(itertools.permutations(kernel.loops[::-1]), key=lambda order: round(misfit(order), 6))


def cuda_rows(folder: Path) -> Iterator[Row]:
    """Yield the CUDA kernels of the compiled files that `resources.py` left in a folder."""
    import resources

    for path in sorted(folder.glob("sm_*.cubin")):
        gpu, usage = path.name.partition("-")[0], json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        for kernel in sass.kernels(path.read_bytes()) if gpu in GPUS else ():
            # TF32 products are those needed, corrections are in bfloat16.
            loops = [{"macs_per_slot": round(loop.macs / loop.slots, 1), **asdict(loop)} for loop in kernel.loops]
            name, _, tile = " ".join(resources.kernel_name(kernel.name).split()).partition(" ")
            mode = "backward" if name == "squeeze_gradients" else "forward"
            path_of = "autocast" if resources.products_of(kernel.name) == 1 else "fp32"
            used = usage[kernel.name]
            yield (
                {"provider": "cuda", "gpu": gpu, "mode": mode, "path": path_of, "block": "", "tile": tile}
                | _occupancy(gpu, used["registers"], used["shared"], used["threads"])
                | {"spilled": used["spill_stores"] + used["spill_loads"], "loops": loops, "rest": asdict(kernel.rest)}
            )


def _occupancy(gpu: str, registers: int, shared: int, threads: int) -> Row:
    """Return what a program needs, and how many fit into a multiprocessor."""
    *_, most_threads, most_shared = GPUS[gpu]
    fits = (65536 // (-(-registers // 8) * 8 * threads), most_shared * 1024 // (shared + 1024), most_threads // threads)
    return {"registers": registers, "shared": shared, "threads": threads, "resident": min(32, *fits)}


# --- bounds ---------------------------------------------------------------------------------------------------------------


def bounds(rows: list[Row]) -> list[Row]:
    """Return the estimates for blocks of `CHANNELS` and for ResNets, stems left out, per GPU, path and mode."""
    import timm
    import torch

    whole = {f"3x3, {channels} channels": Counter({Shape(channels, channels, 3): 1}) for channels in CHANNELS}
    for name in ("resnet18", "resnet50"):
        convs = [m for m in timm.create_model(name).modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels > 3]
        whole[name] = Counter(Shape(m.out_channels, m.in_channels, m.kernel_size[0]) for m in convs)
    found = []
    for gpu, path, what, mode in itertools.product(GPUS, PATHS, whole, MODES):
        if "contiguous" in path and gpu not in SHOWN:
            continue
        sms, ghz, memory, tensor, *_ = GPUS[gpu]
        dtype = PATHS[path][0]
        times = dict.fromkeys(("triton", "cuda", "tensor", "floor"), 0.0)
        for shape, count in whole[what].items():
            problem = _problem(shape, dtype)
            macs = count * sum(product.flops for product in products(problem.plan)) / 2
            least = minimum_bytes(problem.plan, problem.constants, mode, torch.float32, problem.out_dtype)
            times["floor"] += count * least / memory
            times["tensor"] += macs * PASSES[mode] * (3 if dtype == "fp32" else 1) / (tensor * sms * ghz * 1e9)
            for provider in ("triton", "cuda"):
                times[provider] += macs * _slots(rows, provider, gpu, path, mode, shape) / (4 * sms * ghz * 1e9)
        times = {name: round(1e6 * seconds, 1) for name, seconds in times.items() if seconds == seconds}
        found.append({"gpu": gpu, "path": path, "what": what, "mode": mode} | times)
    return found


@functools.cache
def _problem(shape: Shape, dtype: str) -> Problem:
    return Problem(SqueezeCase(shape, shape.topology, dtype))


def _slots(rows: list[Row], provider: str, gpu: str, path: str, mode: str, shape: Shape) -> float:
    """Return the issue slots per product of a block: with the tile that Triton takes for it, with the best of CUDA's."""
    own = [row for row in rows if (row["provider"], row["gpu"], row["mode"]) == (provider, gpu, mode)]
    if provider == "triton":
        from orepa_kernels.backends.triton.configs import largest_filling

        _, choices = _tiles(gpu, path, mode, shape.topology, shape.kernel_size)
        tile = largest_filling([_problem(shape, PATHS[path][0]).plan], choices)
        kind = path, _block(shape.topology, shape.kernel_size), _text(tile)
        own = [row for row in own if (row["path"], row["block"], row["tile"]) == kind]
    else:
        own = [row for row in own if row["path"] == path.partition(",")[0]]

    def per_product(loop: Row) -> float:
        return 1 / loop["macs_per_slot"] + (CUDA_STEP / 2 / loop["macs"] if provider == "cuda" else 0)

    return min((sum(map(per_product, row["loops"])) for row in own if row["loops"]), default=math.nan)


def _block(topology: str, size: int) -> str:
    return f"{topology} {size}x{size}"


def _text(config: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in asdict(config).items())


# --- tables ---------------------------------------------------------------------------------------------------------------


def markdown(content: Row) -> str:
    """Return the tables of a result file: bounds, then main loops, both of `SHOWN`."""
    cells = {(row["gpu"], row["path"], row["what"], row["mode"]): row for row in content["bounds"]}
    names = ("triton", "cuda", "tensor", "floor")
    lines = []
    for gpu, path, what in dict.fromkeys(key[:3] for key in cells if key[0] in SHOWN):
        pair = [cells[gpu, path, what, mode] for mode in MODES]
        lines.append([gpu, path, what, *(" / ".join(f"{row.get(n, math.nan):,.1f}" for row in pair) for n in names)])
    tables = [render(["GPU", "path", "products of", "triton", "cuda", "tensor cores", "memory"], lines, "markdown")]
    lines = []
    for row in content["kernels"]:
        if row["gpu"] in SHOWN and row["block"] in ("", "orepa 3x3"):
            tile = "x".join(re.findall(r"\b(?:BO|BI|BM|TAPS|FM|FI|FO|num_warps)=(\d+)", row["tile"])) or row["tile"]
            for loop in row["loops"]:
                loads = ", ".join(f"{count} x {width} B" for width, count in loop["loads"].items())
                cells_of = [loop["slots"], loop["tensor"], loop["macs_per_slot"], loads, loop["local"], row["spilled"]]
                about = [row["gpu"], f"{row['provider']} {row['mode']}", row["path"], tile, loop.get("role", "")]
                lines.append([*about, *map(str, [*cells_of, row["registers"], row["resident"], loop.get("mb", "")])])
    header = ["GPU", "kernel", "path", "tile", "gradient of", "slots", "tensor-core", "products per slot", "loads"]
    header += ["spills", "spilled elsewhere, B", "registers", "resident", "MB read, 512 channels"]
    tables.append(render(header, lines, "markdown"))
    about = content["environment"]
    versions = f"Triton {about['triton']}, {about['nvcc']}, commit {about['commit']}, {about['date'][:10]}"
    return "\n\n".join(
        [*tables, f"Microseconds, forward / backward, are **estimates**: no GPU has run this. {versions}."]
    )


# --- comparison -----------------------------------------------------------------------------------------------------------


def worse(now: Iterable[Row], before: Iterable[Row]) -> list[str]:
    """Return what became worse, a main loop that takes more slots per product or spills more; and what is not recorded."""
    known = {tuple(row[name] for name in KEY): row for row in before}
    complaints = []
    for row in now:
        key = tuple(row[name] for name in KEY)
        if key not in known or len(known[key]["loops"]) != len(row["loops"]):
            complaints.append(f"{' '.join(filter(None, key))}: not in {RESULTS.name} so: write it anew with --out")
            continue
        for loop, old in zip(row["loops"], known[key]["loops"], strict=True):
            slower = loop["macs_per_slot"] * MARGIN < old["macs_per_slot"]
            if slower or loop["local"] > old["local"]:
                values = [f"{own['macs_per_slot']} products per slot, {own['local']} spills" for own in (old, loop)]
                complaints.append(f"{' '.join(filter(None, key))}: {' -> '.join(values)}")
    return complaints


def _nvcc() -> str:
    import resources

    done = subprocess.run([resources.find_nvcc(), "--version"], capture_output=True, text=True, check=True)
    return "nvcc " + re.findall(r"release (\S+),", done.stdout)[0]


def main(argv: list[str] | None = None) -> int:
    """Write or compare; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="compile everything and write it")
    parser.add_argument("--check", action="store_true", help="compare with the committed file; exit with 1 where worse")
    parser.add_argument("--cubins", type=Path, metavar="FOLDER", help="compiled CUDA kernels, of resources.py --keep")
    args = parser.parse_args(argv)
    import triton

    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"kernels": [], "environment": {}}
    rows = [] if args.out else [row for row in before["kernels"] if "digest" in row]
    known = {row["digest"]: {name: value for name, value in row.items() if name not in KEY} for row in rows}
    same = before["environment"].get("triton") == triton.__version__
    with tempfile.TemporaryDirectory() as folder:
        if args.out and not args.cubins:
            import resources

            resources.compile_all(Path(folder), [int(gpu[3:]) for gpu in GPUS])
        rows = [*cuda_rows(args.cubins or Path(folder))]
    rows += triton_rows(known) if args.out or same else ()
    if args.check:
        complaints = worse(rows, before["kernels"])
        print("\n".join(complaints) or f"{len(rows)} kernels: no main loop is worse than the committed one")
        return 1 if complaints else 0
    rows = json.loads(json.dumps(rows))
    about = {name: value for name, value in environment().items() if name in ("date", "commit")}
    about |= {"triton": triton.__version__, "nvcc": _nvcc()}
    content = {"benchmark": BENCHMARK, "environment": about, "gpus": GPUS, "bounds": bounds(rows)}
    if args.out:
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        text = json.dumps(content, indent=None)[:-1] + ',\n "kernels": [\n' + lines + "\n]}\n"
        args.out.write_text(text, encoding="utf-8")
    print(markdown(content | {"kernels": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
