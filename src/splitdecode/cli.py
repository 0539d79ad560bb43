"""F7: the `splitdecode` command: demo, generate, chat, eval, annotate, train, claims, plan, doctor.

Exit codes: 0 done, 1 a check or an answer failed, 2 wrong input (one line on stderr says what), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from splitdecode import demo, doctor, plan
from splitdecode.annotate import command as annotate
from splitdecode.annotate import report_command
from splitdecode.config import SamplingParams
from splitdecode.decoder import DTYPES, SplitDecoder
from splitdecode.errors import RequestError, SplitDecodeError
from splitdecode.evaluate import claims
from splitdecode.evaluate import command as evaluation
from splitdecode.split.outputs import RequestOutput
from splitdecode.split.policies import ControlTags, HandoffPolicy, LargeOnly, RandomSwitch, SmallOnly
from splitdecode.split.roles import Role
from splitdecode.split.tracing import traced
from splitdecode.terminal import legend, show
from splitdecode.train import command as training


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; `argv` without the program's name."""
    parser = build_parser()
    given = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(given, argparse.Namespace(argv=given))
    try:
        return int(args.run(args))
    except SplitDecodeError as error:
        print(f"splitdecode {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line, subcommand by subcommand."""
    parser = argparse.ArgumentParser(prog="splitdecode", description=__doc__.splitlines()[0][4:])
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text, module in (
        ("demo", "solve a handful of problems with the embedded pair", demo),
        ("eval", "accuracy and cost of every policy, on synthetic families, data sets, tasks of lm-eval", evaluation),
        ("train", "teach a small model when to hand over", training),
        ("claims", "each published figure beside its source, its caveat and our own measurement", claims),
        ("plan", "what a pair of models needs and gives on a GPU, from geometry alone", plan),
        ("doctor", "what this machine can do and what is missing", doctor),
        ("annotate", "put control tags around the hard parts of reasoning traces", annotate),
        ("annotate-report", "figures of annotated traces, agreement of two annotations", report_command),
    ):
        command = commands.add_parser(name, help=text, description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    command = commands.add_parser("generate", help="answer prompts, streamed in the authors' colours")
    command.add_argument("prompts", nargs="*", help="prompts; none: one per line from --file or standard input")
    command.add_argument("--file", type=Path, help="a file with one prompt per line")
    command.add_argument("--chrome-trace", type=Path, metavar="FILE", help="record every step, for ui.perfetto.dev")
    command.add_argument("--watch-seams", type=int, default=0, metavar="N", help="let both models score the text of "
                         "every N-th answer with hand-offs (two prefills): do they understand each other? (default 0: "
                         "no)")  # fmt: skip
    _add_common(command)
    command.set_defaults(run=generate)
    command = commands.add_parser("chat", help="talk to a pair; an empty line or Ctrl-D ends it")
    command.add_argument("--system", help="a system message")
    _add_common(command)
    command.set_defaults(run=chat, watch_seams=0)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("models")
    models.add_argument("--small", help="directory or hub id of the small model (default: the embedded pair)")
    models.add_argument("--large", help="directory or hub id of the large model")
    for role in Role:
        models.add_argument(f"--{role}-revision", help=f"hub revision of the {role} model")
    models.add_argument("--device", default="cpu")
    models.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    models.add_argument("--kv-cache-memory", default="256MiB", help="for both caches together (default 256MiB)")
    models.add_argument(
        "--policy", default="tags", choices=["tags", "small", "large", "random"], help="who writes where"
    )
    models.add_argument("--p", type=float, default=0.05, help="random: the large model's share of chunks")
    models.add_argument("--chunk", type=int, default=32, help="random: tokens per chunk")
    sampling = parser.add_argument_group("sampling (default: the small checkpoint's generation_config)")
    sampling.add_argument("--max-tokens", type=int)
    for name, kind in (("temperature", float), ("top-p", float), ("top-k", int), ("min-p", float), ("seed", int)):
        sampling.add_argument(f"--{name}", type=kind)
    sampling.add_argument("--stop", action="append", help="a string that ends the answer; may be repeated")
    sampling.add_argument("--keep-special", action="store_true", help="show special tokens such as <think>")
    parser.add_argument("--json", action="store_true", help="one JSON object per answer")


def _decoder(args: argparse.Namespace) -> SplitDecoder:
    options = {name: getattr(args, name) for name in ("device", "kv_cache_memory", "watch_seams")}
    if args.small is None and args.large is None:
        return SplitDecoder.demo(**options, **({} if args.dtype == "auto" else {"dtype": args.dtype}))
    if args.small is None or args.large is None:
        raise RequestError("--small and --large: found one of them, expected both or (for the embedded pair) neither")
    return SplitDecoder.from_pretrained(
        args.small,
        args.large,
        dtype=args.dtype,
        revisions=[getattr(args, f"{role}_revision") for role in Role],
        **options,
    )


def _params(args: argparse.Namespace, decoder: SplitDecoder) -> SamplingParams:
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    default = decoder.default_sampling_params
    return replace(default, **given, skip_special_tokens=not args.keep_special)


def _policy(args: argparse.Namespace) -> HandoffPolicy:
    match args.policy:
        case "small":
            return SmallOnly()
        case "large":
            return LargeOnly()
        case "random":
            return RandomSwitch(args.p, args.chunk)
    return ControlTags()


def generate(args: argparse.Namespace) -> int:
    """`splitdecode generate`: one prompt streams; many run together behind a progress bar."""
    prompts = args.prompts or _lines(args.file)
    console = Console(highlight=False)
    with _decoder(args) as decoder, traced(decoder, args.chrome_trace):
        params, policy = _params(args, decoder), _policy(args)
        if len(prompts) == 1 and not args.json:
            console.print(legend())
            finish = None
            for delta in decoder.stream(prompts[0], params, handoff=policy):
                show(console, delta)
                finish = delta.finish_reason
            console.print()
            return 1 if finish == "error" else 0
        outputs = decoder.generate(prompts, params, handoff=policy, use_tqdm=sys.stderr.isatty())
        for output in outputs:
            print(json.dumps(as_dict(output)) if args.json else f"{output.prompt!r}\n{output.outputs[0].text}\n")
        for alarm in decoder.health.alarms():
            print(f"splitdecode generate: {alarm}", file=sys.stderr)
        return 1 if any(o.finish_reason == "error" for output in outputs for o in output.outputs) else 0


def chat(args: argparse.Namespace) -> int:
    """`splitdecode chat`: reads a message per line, streams the answer, remembers the conversation."""
    console = Console(highlight=False)
    messages: list[dict[str, str]] = [{"role": "system", "content": args.system}] if args.system else []
    with _decoder(args) as decoder:
        params, policy = _params(args, decoder), _policy(args)
        decoder.chat_prompts([*messages, {"role": "user", "content": ""}])  # a missing template is said before typing
        if not args.json:
            console.print(legend())
        while line := _ask(console, quiet=args.json):
            asked = [*messages, {"role": "user", "content": line}]
            try:
                small, large = decoder.chat_prompts(asked)
                if args.json:
                    output = decoder.generate(small, params, handoff=policy, large_prompt=large)[0]
                    print(json.dumps(as_dict(output)), flush=True)
                    said = output.outputs[0].text
                else:
                    said = ""
                    for delta in decoder.stream(small, params, handoff=policy, large_prompt=large):
                        show(console, delta)
                        said += delta.text
                    console.print()
            except RequestError as error:  # too long for the context, say: what was said before stands
                print(f"splitdecode chat: {error}", file=sys.stderr)
                continue
            messages = [*asked, {"role": "assistant", "content": said}]
    return 0


def _ask(console: Console, *, quiet: bool) -> str:
    try:
        return (input() if quiet or not sys.stdin.isatty() else console.input("[bold]> [/bold]")).strip()
    except EOFError:
        return ""


def _lines(file: Path | None) -> list[str]:
    if file is not None and not file.is_file():
        raise RequestError(f"--file: found no file {file}")
    try:
        text = file.read_text(encoding="utf-8") if file is not None else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"{file or 'standard input'}: found bytes that are not UTF-8 ({error.reason})") from None
    lines = [line + "\n" for line in text.split("\n") if line.strip()]
    if not lines:
        raise RequestError("prompts: found none, expected arguments, --file, or lines on standard input")
    return lines


def as_dict(output: RequestOutput) -> dict[str, Any]:
    """A RequestOutput as JSON can hold it."""
    found = asdict(output)
    found["metrics"]["offload_fraction"] = output.metrics.offload_fraction
    return found
