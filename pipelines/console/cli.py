"""The command line: one sub-command per stage. User errors are one line and exit status 2."""

import argparse
import contextlib
import importlib
import json
import os
import sys
import textwrap
from dataclasses import Field, fields
from typing import Any

from data.filesystem import to_path
from infra import storage
from models.allocator import keep_freed_memory
from pipelines.console import cluster
from pipelines.console.config import Parser, add_fields, build, flag, mask_passwords, read_yaml, suggestion

COMMANDS = {
    "demo": "the whole way on the embedded digits or on photographs, in minutes",
    "ingest": "images or features to sharded Parquet and a manifest",
    "embed": "features of a dataset's images by a pretrained backbone",
    "train": "train a method and evaluate it",
    "tune": "search a method's hyper-parameters without target labels",
    "evaluate": "metrics and plots of a run or a registered model",
    "reproduce": "the papers' tables on the data at hand, ours beside theirs",
    "register": "register a run's encoder, alias challenger",
    "promote": "make the challenger the champion if it is better",
    "sync": "send a run's record to a tracking server that was away",
    "encode": "folder or Parquet to a Parquet of codes",
    "index": "codes to a search index",
    "search": "find the nearest images of an index",
    "serve": "search as a service on Ray Serve, with a page",
    "translate": "source images in the target's style",
    "submit": "run a command as a Ray job: submit [options] -- train igan ...",
    "methods": "the methods, with papers, needs and defaults",
    "datasets": "the datasets known by name",
}
MODULES = {"tune": "tuning.search"}  # commands that are not in pipelines
# the option that a command writes to besides --out and --grid
WRITTEN = {"ingest": "dataset"} | dict.fromkeys(("train", "tune", "reproduce", "sync"), "storage")
USER_ERRORS = (ValueError, OSError, FloatingPointError)


def parse(argv: list[str]) -> tuple[str, Any, argparse.Namespace]:
    """Parse a command line.

    Returns:
        The command's name, its config and the common options.

    Raises:
        ValueError: an argument is wrong; one line says which.
    """
    top = Parser(prog="hashbridge", description="Binary codes that find images across domains.", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    name = next((each for each in argv if not each.startswith("-")), "")
    if name and name not in COMMANDS:
        raise ValueError(f"no command {name!r}{suggestion(name, COMMANDS)}")
    parsers = {each: commands.add_parser(each, help=text, description=text, allow_abbrev=False) for each, text in COMMANDS.items()}
    if not name:
        top.print_help()
        raise SystemExit(0 if {"-h", "--help"} & set(argv) else 2)
    stage = importlib.import_module(MODULES.get(name, f"pipelines.{name}"))
    parser = parsers[name]
    add_fields(parser, [each for each in fields(stage.Config) if each.init and each.metadata])
    common = parser.add_argument_group("common options")
    common.add_argument("--config", metavar="FILE", help="YAML file of options; the command line goes before it")
    common.add_argument("--json", action="store_true", help="print one JSON object as the last line of standard output")
    common.add_argument("--verbose", action="store_true", help="show Ray's logs and errors' tracebacks")
    if hasattr(stage, "method_fields"):
        _add_method_fields(parser, name, stage.method_fields(), argv)
    cut = argv.index("--") if name == "submit" and "--" in argv else len(argv)
    given, unknown = top.parse_known_args(argv[:cut])
    if unknown:
        known = [text for action in parser._actions for text in action.option_strings]
        wrong = unknown[0].split("=")[0]
        raise ValueError(f"no option {wrong}{suggestion(wrong, known)}")
    values = {k: v for k, v in vars(given).items() if k not in {"command", "config", "json", "verbose"}}
    values = (read_yaml(given.config) if given.config else {}) | values
    if name == "submit" and argv[cut + 1 :]:
        parse(argv[cut + 1 :])  # report a wrong option before uploading anything
        values["arguments"] = argv[cut + 1 :]
    make = getattr(stage, "make_config", None)
    return name, make(values) if make else build(stage.Config, values), given


def _add_method_fields(parser: Parser, command: str, methods: dict[str, list[Field]], argv: list[str]) -> None:
    """Add the hyper-parameters of the method that the command line names; of all methods, listed by name only, if it names none."""
    named = next((each for each in argv if each in methods), "")
    if named:
        add_fields(parser.add_argument_group(f"hyper-parameters of {named} (`hashbridge methods {named}` shows the paper's values)"), methods[named])
        return
    add_fields(parser, {each.name: each for own in methods.values() for each in own}.values(), hidden=True)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"hyper-parameters by method, explained by `hashbridge {command} METHOD --help`:\n"
    for name, own in methods.items():
        options = " ".join(flag(each.name) for each in own)
        parser.epilog += textwrap.fill(options, 110, initial_indent=f"  {name:<13}", subsequent_indent=" " * 15, break_on_hyphens=False) + "\n"


def set_default_environment() -> None:
    """Switch off telemetry and noisy logs, and limit spinning threads; variables that the user has set are kept."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "RAY_DEDUP_LOGS": "1", "RAY_worker_niceness": "0",
        "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "KINETO_LOG_LEVEL": "9",
    }.items():  # fmt: skip
        os.environ.setdefault(name, value)
    os.environ.update(cluster.spin_limit())


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    set_default_environment()
    keep_freed_memory()
    verbose = "--verbose" in argv
    try:
        name, config, common = parse(argv)
        stage = importlib.import_module(MODULES.get(name, f"pipelines.{name}"))
        cluster.set_verbose(verbose)
        check_buckets(name, config)
        with contextlib.redirect_stdout(sys.stderr) if common.json else contextlib.nullcontext():
            result = stage.run(config)
        if common.json and result:
            print(json.dumps(result, default=float), flush=True)
        return 0
    except USER_ERRORS as error:
        if verbose:
            raise
        print(f"hashbridge: {error_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if verbose or not type(error).__module__.startswith("botocore."):
            raise
        print(f"hashbridge: bucket: {error_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hashbridge: interrupted", file=sys.stderr)
        return 130


def check_buckets(name: str, config: Any) -> None:
    """Check that each bucket given to a command allows what the command needs.

    Raises:
        ValueError: a bucket does not.
    """
    for each in fields(config):
        value = getattr(config, each.name)
        if isinstance(value, str) and value.startswith(storage.SCHEME):
            storage.check(str(to_path(value.partition("#")[0])), each.name in ("out", "grid", WRITTEN.get(name)))


def error_line(error: BaseException) -> str:
    """An error's message on one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return _plain(f"{error.strerror}{where}")
    return _plain(str(error)) or type(error).__name__


def _plain(text: str) -> str:
    """Text on one line, with passwords masked and control characters replaced."""
    return "".join(each if each.isprintable() else "\ufffd" for each in mask_passwords(" ".join(text.split())))


