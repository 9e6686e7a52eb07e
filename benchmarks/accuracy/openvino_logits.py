"""Writes OpenVINO's logits: openvino_logits.py MODEL WEIGHT_FORMAT WINDOWS.npy OUT.npy [GROUP_SIZE]

It runs in OpenVINO's environment, so it imports nothing of this project. The logits [windows, tokens - 1, vocabulary]
are those after all tokens but the last, as float16.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found]


def main() -> None:
    model, weight_format, windows_file, out, *group_size = sys.argv[1:]
    windows = np.load(windows_file)
    with tempfile.TemporaryDirectory() as target:
        options = ["--task", "text-generation-with-past", "--weight-format", weight_format]
        if group_size:
            options += ["--group-size", *group_size]
        command = Path(sys.executable).with_name("optimum-cli")
        subprocess.run([command, "export", "openvino", "--model", model, *options, target], check=True)
        request = openvino.Core().compile_model(Path(target) / "openvino_model.xml", "CPU").create_infer_request()
        logits: Any = None
        for index, window in enumerate(windows):
            request.reset_state()
            length = len(window)
            inputs = {
                "input_ids": window[None, :],
                "attention_mask": np.ones((1, length), dtype=np.int64),
                "position_ids": np.arange(length, dtype=np.int64)[None, :],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
            found = request.infer(inputs)["logits"][0, :-1]
            if logits is None:
                shape = (len(windows), *found.shape)
                logits = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
                    out, mode="w+", dtype=np.float16, shape=shape
                )
            logits[index] = found
        logits.flush()


if __name__ == "__main__":
    main()
