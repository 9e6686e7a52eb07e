"""python -m ipex_vllm.low_bit save --model-path X --low-bit sym_int4 --out DIR"""

from __future__ import annotations

from pathlib import Path

from ipex_vllm.demo import resolve_model_path
from ipex_vllm.errors import OneLine, OptionError, run_main
from ipex_vllm.low_bit.formats import FORMATS, resolve
from ipex_vllm.low_bit.recipe import OWN_TEXT
from ipex_vllm.options import Parser


def run() -> None:
    """Raises OptionError, and OneLine for a checkpoint that cannot be read or written."""
    parser = Parser(prog="python -m ipex_vllm.low_bit", description="Low-bit checkpoints.")
    commands = parser.add_subparsers(required=True)
    save = commands.add_parser("save", help="quantize a checkpoint once, to open it later without quantizing")
    save.add_argument(
        "--model-path", required=True, help='directory or Hugging Face name of the model to quantize, or "demo"'
    )
    save.add_argument("--low-bit", required=True, help=f"format: {', '.join(FORMATS)}")
    save.add_argument("--out", required=True, type=Path, help="directory to write, new or empty")
    save.add_argument("--low-bit-head", help='format of the output head: a name, "same" or "none"; default: 8 bits')
    save.add_argument("--low-bit-outer", help="format of the first and the last layer; default: as the others")
    save.add_argument("--group-size", type=int, help="inputs that share a scale; default: the format's own number")
    save.add_argument(
        "--calibrate",
        nargs="?",
        const=OWN_TEXT,
        metavar="TEXT",
        help="round by what the inputs of each layer are on a text, by default one that the model writes itself: "
        "minutes, and the whole model in memory, for answers nearer to the original's",
    )
    options = parser.parse_args()

    try:
        format = resolve(options.low_bit)
    except ValueError as error:
        raise OptionError(f"--low-bit: {error}") from error
    if options.out.exists() and not options.out.is_dir():
        raise OptionError(f"--out {options.out} is a file: give a directory, new or empty")

    if options.calibrate not in (None, OWN_TEXT) and not Path(options.calibrate).is_file():
        raise OptionError(f"--calibrate {options.calibrate}: there is no such text")

    from ipex_vllm.low_bit.save import save as save_checkpoint

    try:
        save_checkpoint(
            resolve_model_path(options.model_path),
            format,
            options.out,
            options.low_bit_head,
            options.group_size,
            options.calibrate,
            options.low_bit_outer,
        )
    except ValueError as error:
        raise OneLine(str(error)) from error


if __name__ == "__main__":
    run_main(run)
