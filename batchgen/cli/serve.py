"""`serve`: OpenAI's Batch API for one model of this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from batchgen.cli.common import out
from batchgen.core.errors import ConfigError, ExitCode
from batchgen.core.runtime import Caller, called, option

_PATH = click.Path(path_type=Path)
_LOCAL = ("127.0.0.1", "localhost", "::1")


@click.command()
@click.option("--root", required=True, type=_PATH, metavar="DIR", help="Files and batches.")
@click.option("--model", help="Folder of the model, or hub id. Default: that of --config.")
@click.option("--config", "config_file", type=_PATH, metavar="FILE", help="serve.toml.")
@click.option("--keys", "keys_file", type=_PATH, metavar="FILE", help="Who may call.")
@click.option("--new-key", metavar="NAME", help="Add a key to --keys, print it, and end.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8080, type=click.IntRange(1, 65535), show_default=True)
def serve(  # noqa: PLR0913, PLR0917 - the command's own options
    root: Path,
    model: str | None,
    config_file: Path | None,
    keys_file: Path | None,
    new_key: str | None,
    host: str,
    port: int,
) -> None:
    """Serve OpenAI's Batch API, /v1/files and /v1/batches, until it is ended.

    What it has been given lies in DIR; killed and started again it goes on where it was. Without
    --keys everybody on this machine may call, and nobody else.

    Example: batchgen serve --root batches --model Qwen/Qwen3-8B
    """
    from batchgen.serve.config import load_config
    from batchgen.serve.keys import Keys
    from batchgen.serve.keys import new_key as make_key

    with called(Caller(str(root), is_folder=True)):
        if new_key is not None:
            if keys_file is None:
                raise ConfigError("--new-key", [f"expected {option('--keys', 'FILE')} beside it"])
            out(make_key(keys_file, new_key))
            return
        if keys_file is None and host not in _LOCAL:
            problem = (
                f"{host} can be reached by others; expected {option('--keys', 'FILE')} with it"
            )
            raise ConfigError("--host", [problem])
        config, keys = load_config(config_file, model), Keys(keys_file)
        from batchgen.serve.server import run

        run(root, config, keys, host, port)
    sys.exit(ExitCode.COMPLETE)
