"""Parts of quantized weights: some outputs, a rank's inputs, several as one, more rows."""

from __future__ import annotations

from dataclasses import replace

import torch

from ipex_vllm.low_bit.quantize import QuantizedWeight


def outputs(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    """Some of the weight's outputs."""
    mins = None if weight.mins is None else weight.mins[rows]
    return replace(weight, codes=weight.codes[rows], scales=weight.scales[rows], mins=mins)


def own_inputs(weight: torch.Tensor | QuantizedWeight, rank: int, ranks: int) -> torch.Tensor | QuantizedWeight:
    """This rank's part of the inputs. Raises ValueError where that would cut a group."""
    if ranks == 1:
        return weight
    if isinstance(weight, torch.Tensor):
        return weight.chunk(ranks, dim=1)[rank]
    if weight.scales.shape[1] % ranks:
        inputs, group = weight.codes.shape[1], weight.group_size
        raise ValueError(f"{inputs} inputs in groups of {group} cannot be split over {ranks} ranks")
    terms = [
        None if term is None else term.chunk(ranks, dim=1)[rank].contiguous()
        for term in (weight.codes, weight.scales, weight.mins)
    ]
    return QuantizedWeight(weight.format, terms[0], terms[1], terms[2])  # type: ignore[arg-type]


def joined(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """Weights of one format, one below the other."""
    if len(weights) == 1:
        return weights[0]
    mins = None if weights[0].mins is None else torch.cat([weight.mins for weight in weights])  # type: ignore[misc]
    codes, scales = torch.cat([weight.codes for weight in weights]), torch.cat([weight.scales for weight in weights])
    return QuantizedWeight(weights[0].format, codes, scales, mins)


def codes_of(weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    return weight if isinstance(weight, torch.Tensor) else weight.codes


def padded(weight: torch.Tensor | QuantizedWeight, num_rows: int) -> torch.Tensor | QuantizedWeight:
    """The weight with so many rows of zeros below."""

    def pad(term: torch.Tensor) -> torch.Tensor:
        return torch.cat((term, term.new_zeros(num_rows, term.shape[1])))

    if num_rows == 0:
        return weight
    if isinstance(weight, torch.Tensor):
        return pad(weight)
    mins = None if weight.mins is None else pad(weight.mins)
    return QuantizedWeight(weight.format, pad(weight.codes), pad(weight.scales), mins)
