"""Compiles, on all cores side by side, the kernels that gpu_suite's stages launch: they find them in Triton's cache.

    python3 benchmarks/gpu_compile.py                  for the GPU that is here
    python3 benchmarks/gpu_compile.py --arch 90        without one: does everything compile?

Launches are not listed but made, on tensors without memory (torch's meta device): every step that latency.py and the
decoder's GPU tests capture, every contest of kernels.py, every configuration of gpu_first.py. Each of --jobs processes
goes through all of them and compiles its share of those that differ. What is missed is compiled when it is launched.

The last line is one JSON document. Exit code 1: something did not compile; 2: wrong input.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_suite import LATENCY

META = torch.device("meta")
DECODERS: tuple[dict[str, Any], ...] = (  # of tests/test_decoder_gpu.py
    {},
    *(
        {"max_num_seqs": 1} | more
        for more in (
            {},
            {"steps_per_graph": 4},
            {"programmatic_launch": True},
            {"programmatic_launch": True, "steps_per_graph": 3},
            {"page_size": 64},
            {"l2_prefetch": True},
        )
    ),
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
)


class Compiler:
    """Takes the place of launching: compiles one share of the launches that differ."""

    def __init__(self, arch: int, part: int, parts: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        self.part, self.parts = part, parts
        self.seen: set[str] = set()
        self.compiled, self.failed = 0, dict[str, str]()
        self._run: Callable[..., Any] = JITFunction.run
        JITFunction.run = lambda kernel, *args, **more: self.launch(kernel, args, more)

        class Absent:
            """The device a launch asks about; nothing is launched."""

            get_current_device = get_current_stream = staticmethod(lambda *_: 0)
            get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))

        driver.set_active(Absent())

    def launch(self, kernel: Any, args: tuple[Any, ...], more: dict[str, Any]) -> None:
        given = dict(zip((param.name for param in kernel.params), args, strict=False)) | more
        free = {param.name for param in kernel.params if param.do_not_specialize}
        kinds = [(name, _kind(value) if name not in free else type(value)) for name, value in sorted(given.items())]
        key = f"{kernel.fn.__name__} {kinds}"
        if key in self.seen:
            return
        self.seen.add(key)
        kernel.cache_key  # noqa: B018  (it depends on what was asked for its key before: ask as the stages will)
        if zlib.crc32(key.encode()) % self.parts != self.part:
            return
        try:
            made = self._run(kernel, *args, **(more | {"warmup": True}))
        except Exception as error:  # the stage that launches it will say the same; the others go on
            self.failed[key[:300]] = f"{type(error).__name__}: {error}"[-300:]
            return
        self.compiled += 1
        if torch.cuda.is_available():
            _build_launcher(made)


def _kind(value: Any) -> Any:
    """What a kernel is specialised for, or finer."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return type(value) if isinstance(value, float) or callable(value) or isinstance(value, tuple) else value


def _build_launcher(made: Any) -> None:
    """Triton's launcher of this signature: C, a second of the host's compiler each."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(made.src, made.metadata)
    except Exception as error:  # another Triton builds it in another way, at the first launch
        print(f"no launcher: {type(error).__name__}: {error}", file=sys.stderr)


def on_meta(config: Any, dtype: Any) -> Any:
    """A Transformer without memory."""
    from splitdecode.models.transformer import Transformer
    from splitdecode.models.weights import shape_weights

    model = Transformer.__new__(Transformer)
    model.config, model.weights, model.device, model.dtype = config, shape_weights(config, dtype), META, dtype
    return model


def meta_runner(model: Any, cache: Any, config: Any, max_len: int, vocab_limit: int, **ids: Any) -> Any:
    """Stands in for runtime.runners.make_runner."""
    from splitdecode.ops import step_ops
    from splitdecode.runtime.device import DeviceRunner
    from splitdecode.runtime.slots import DeviceSlots

    slots = DeviceSlots(vocab_limit, config.max_num_seqs, META, torch.float32, **ids)
    ops = step_ops(META, pdl=config.programmatic_launch, launchers=True)
    return DeviceRunner(model, cache, slots, config, max_len, ops=ops)


def run_steps(decoder: Any) -> None:
    """Every step both models capture, an eager prompt, and the edits before a step."""
    from splitdecode.models.step import StepShape
    from splitdecode.runtime.device import LONG_QUERIES

    for runner in decoder.engine.runners:
        config = runner.model.config
        queries = LONG_QUERIES // (config.num_heads // config.num_kv_heads)
        long = [StepShape(100, 100, 1, queries, 1, full, split=False) for full in (False, True)]
        for shape in (*runner.shapes(), *long):
            runner.capture(shape)
            runner._graphs[shape].replay()
        runner.ops.patch(runner._edits[0, :16], runner.table)
        runner.ops.count_patch(runner._edits[1, :16], runner.sampler.state.counts)


def headline_steps() -> None:
    """The pair of the latency stage."""
    import headline
    import latency
    import pairs

    args = latency.arguments().parse_args([*LATENCY, "--device", "meta"])
    args.page_size = 64
    headline.check_fits = headline.bandwidths = headline.machine = lambda *_, **__: {}  # type: ignore[assignment]
    pairs.load_model = lambda config, dtype, **_: on_meta(config, dtype)  # type: ignore[assignment]
    run_steps(headline.Headline(args).decoder)


def demo_steps(options: dict[str, Any]) -> None:
    """The embedded pair, as the decoder's tests build it."""
    from splitdecode import decoder

    decoder.load_model = lambda point, dtype, **_: on_meta(point.config, dtype)  # type: ignore[assignment]
    run_steps(decoder.SplitDecoder.demo(device="meta", **options))


def contests() -> None:
    import device_kernels

    from splitdecode.ops import step_ops

    for _, make in device_kernels.all_contests(step_ops(META, launchers=True)):
        make().call(0)


def ceilings() -> None:
    """Every configuration of gpu_first.py."""
    import gpu_kernels as g
    from gpu_stages import HEADS, SHAPES
    from gpu_timing import half

    for block, warps, steps in g.READS:
        g.read(torch.empty(16 * block * steps, device=META), torch.empty(16, device=META), block, warps, steps)
    for pdl in (False, True):
        g.tick(torch.empty(132, device=META), torch.empty(132, device=META), pdl)
        g.link(half(g.LINK), half(16, g.LINK), half(16), pdl)
    for k in sorted({k for shapes in SHAPES.values() for _, k, _ in shapes.values()}):
        for how in g.GEMVS:
            g.gemv(half(k), half(16, k), half(16), how)
    one = torch.empty(1, dtype=torch.int32, device=META)
    for heads, kv in HEADS.values():
        for count in g.SPLITS:
            for tile in g.ATTENDS:
                q, cache = half(heads, g.HEAD), half(1, g.PAGE, 2, kv, g.HEAD)
                g.attend(q, cache, one, one, g.Partials.of(count, heads, "meta"), q, tile)


def everything() -> Iterator[tuple[str, Callable[[], None]]]:
    """Names and thunks."""
    yield "headline", headline_steps
    yield "contests", contests
    yield "ceilings", ceilings
    for options in DECODERS:
        yield f"demo {options}", partial(demo_steps, options)


def run_part(args: argparse.Namespace) -> int:
    """One share, in this process."""
    os.environ["TRITON_INTERPRET"] = "0"
    import gpu_timing

    gpu_timing.DEVICE = "meta"
    compiler = Compiler(args.arch, args.part, args.jobs)
    from splitdecode import decoder
    from splitdecode.kernels import shims

    decoder.make_runner = meta_runner
    if torch.cuda.is_available():  # configurations go by its name
        name = torch.cuda.get_device_name()
        shims.device_name = lambda _: name  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    failed = {}
    with torch.inference_mode():
        for name, launch in everything():
            if args.only not in name:
                continue
            try:
                launch()
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps({"seen": len(compiler.seen), "compiled": compiler.compiled, "failed": failed | compiler.failed}))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--arch", type=int, help="90 for sm_90 (default: the device's)")
    parser.add_argument("--only", default="", help="only what has this in its name: headline, contests, demo, ceilings")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part is not None:
        return run_part(args)
    if args.arch is None and not torch.cuda.is_available():
        print("gpu_compile.py: --arch: found none and no CUDA device, expected 80, 90, ...", file=sys.stderr)
        return 2
    arch = args.arch or "".join(map(str, torch.cuda.get_device_capability()))
    start = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--arch", str(arch), "--jobs", str(args.jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    started = [
        subprocess.Popen(
            [*command, "--only", args.only, "--part", str(part)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for part in range(args.jobs)
    ]
    said = [child.communicate()[0] for child in started]
    ended = [text for text, child in zip(said, started, strict=True) if child.returncode == 0]
    found = [json.loads(text.splitlines()[-1]) for text in ended]
    failed = {name: error for one in found for name, error in one["failed"].items()}
    document = {"benchmark": "gpu_compile", "kernels": sum(one["compiled"] for one in found), "failed": failed}
    print(json.dumps(document | {"seconds": round(time.monotonic() - start, 1), "jobs": args.jobs}))
    return int(bool(failed) or len(found) < args.jobs)


if __name__ == "__main__":
    sys.exit(main())
