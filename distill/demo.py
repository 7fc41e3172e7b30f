"""`python -m distill.demo model=runs/instaflow/export teacher=runs/instaflow/teacher`: a local page that samples both."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from distill import load, terminal
from distill.sample import check_device
from distill.stages.demo import LOOPBACK, Shown, server


@dataclass
class Options:
    """Options:

    model: an export, any model folder, or a student of the package, such as digits/dmd
    teacher: another model folder, shown beside it; null: none
    host: address to listen on; other computers reach the page only with one of this computer's, and then anybody can sample
    port: 0: a free one
    device: cpu, cuda, cuda:N or mps"""

    model: str = ""
    teacher: str | None = None
    host: str = LOOPBACK[0]
    port: int = 7860
    device: str = "cpu"


def parse(arguments: list[str]) -> Options:
    """Parse `key=value` arguments. Raises ValueError naming the key."""
    options = terminal.read_options(Options, arguments)
    if not options.model:
        raise ValueError("model: missing; expected a model folder, or a student of the package: digits/dmd")
    if not 0 <= options.port < 2**16:
        raise ValueError(f"port: found {options.port}, expected 0 .. 65535")
    check_device(options.device)
    return options


def models(options: Options) -> list[Shown]:
    """The student and, if there is one, the teacher. Raises ValueError for models of points or of other conditions."""
    named = {"student": options.model} | ({} if options.teacher is None else {"teacher": options.teacher})
    found = [Shown(name, path, load(path, device=options.device)) for name, path in named.items()]
    for shown in found:
        if not shown.generator.decoder.images:
            raise ValueError(f"model: {shown.path}: makes points, expected images")
        if shown.generator.conditions.kind != found[0].generator.conditions.kind:
            raise ValueError(
                f"teacher: {shown.path}: takes {shown.generator.conditions.words()}, expected the model's "
                f"{found[0].generator.conditions.words()}"
            )
    return found


def main() -> None:
    """Load the models and serve the page until Ctrl-C."""
    with terminal.report_errors():
        if terminal.asked_for_help(__doc__, Options.__doc__):
            return
        options = parse(sys.argv[1:])
        try:
            serving = server(models(options), options.host, options.port)
        except OSError as error:
            if error.filename is not None:
                raise
            raise OSError(
                f"host, port: {options.host}:{options.port}: {error.strerror}; expected a free port, or port=0"
            ) from error
        with serving:
            print(f"http://{options.host}:{serving.server_address[1]}/ (Ctrl-C stops)", flush=True)
            try:
                serving.serve_forever()
            except KeyboardInterrupt:
                print("stopped")


if __name__ == "__main__":
    main()
