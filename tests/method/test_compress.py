"""The tensor core, ``compress_tokens``, against a slow reference."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_compress import assert_same, problems, reference, tensors
from torch import Tensor

from visionzip import CompressedTokens, compress_tokens

properties = settings(max_examples=60, deadline=None)


# --- compress_tokens: what it returns ---


def test_the_papers_setting():
    """54 + 10 of the 577 tokens of LLaVA-1.5's tower."""
    result = compress_tokens(**tensors(batch=3, length=577), dominant=54, contextual=10)
    assert result.tokens.shape == (3, 64, 6)
    assert result.dominant_indices.shape == (3, 54) and result.target_indices.shape == (3, 10)
    assert result.assignment.shape == (3, 577)


@properties
@given(problems())
def test_equals_the_slow_reference(problem: dict[str, Any]):
    assert_same(compress_tokens(**problem), reference(**problem))


@properties
@given(problems())
def test_every_token_is_accounted_for_once(problem: dict[str, Any]):
    result = compress_tokens(**problem)
    batch, length, _ = problem["hidden_states"].shape
    compressed = problem["dominant"] + problem["contextual"] < length
    dominant, contextual = (problem["dominant"], problem["contextual"]) if compressed else (length, 0)
    assert result.tokens.shape == (batch, dominant + contextual, 6)
    assert result.tokens.dtype == problem["hidden_states"].dtype

    for kept, targets, assignment in zip(*result[1:4], strict=True):
        assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == dominant
        assert not problem["cls_token"] or kept[0] == 0
        assert targets.tolist() == sorted(set(targets.tolist())) and len(targets) == contextual
        assert (assignment[kept] == -1).all()
        assert assignment[targets].tolist() == list(range(contextual))
        members = assignment[assignment >= 0].bincount(minlength=contextual)
        assert len(members) == contextual
        assert members.sum() == (length - dominant if contextual else 0)


@properties
@given(problems())
def test_each_image_is_compressed_alone(problem: dict[str, Any]):
    result = compress_tokens(**problem)
    for image in range(len(problem["hidden_states"])):
        alone = problem | {name: problem[name][image, None] for name in ("hidden_states", "scores", "keys")}
        assert_same(compress_tokens(**alone), CompressedTokens(*(value[image, None] for value in result[:4])))


@properties
@given(problems(scores=("distinct",)), st.randoms())
def test_permuting_patches_keeps_the_same_dominant_ones(problem: dict[str, Any], random: Any):
    result = compress_tokens(**problem)
    first = int(problem["cls_token"])
    patches = list(range(problem["scores"].shape[1]))
    random.shuffle(patches)
    order = torch.tensor([0] * first + [patch + first for patch in patches])
    permuted = problem | {
        "hidden_states": problem["hidden_states"][:, order],
        "scores": problem["scores"][:, patches],
        "keys": problem["keys"][:, order],
    }
    kept = order[compress_tokens(**permuted).dominant_indices]
    assert torch.equal(kept.sort(dim=1).values, result.dominant_indices)


# --- compress_tokens: examples ---


def test_merge_rules_by_hand():
    """CLS and position 2 are kept; 1 and 4 are targets; 3 looks like 1, and 5 like 4."""
    inputs = {
        "hidden_states": torch.tensor([[[9.0], [1.0], [8.0], [3.0], [10.0], [20.0]]]),
        "scores": torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.4]]),
        "keys": torch.tensor([[[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0]]]),
        "dominant": 2,
        "contextual": 2,
    }
    released = compress_tokens(**inputs)  # target + mean(assigned)
    assert released.tokens.flatten().tolist() == [9, 8, 1 + 3, 10 + 20]
    assert released.dominant_indices.tolist() == [[0, 2]]
    assert released.target_indices.tolist() == [[1, 4]]
    assert released.assignment.tolist() == [[-1, 0, -1, 0, 1, 1]]
    average = compress_tokens(**inputs, merge="average")  # mean over the target and its assigned
    assert average.tokens.flatten().tolist() == [9, 8, (1 + 3) / 2, (10 + 20) / 2]


@pytest.mark.parametrize("cls_token", [True, False])
def test_equal_scores_resolve_to_the_lower_index(cls_token: bool):
    inputs = tensors(cls_token=cls_token)
    inputs["scores"] = torch.ones_like(inputs["scores"])
    result = compress_tokens(**inputs, dominant=5, contextual=2, cls_token=cls_token)
    assert result.dominant_indices.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_equal_similarities_resolve_to_the_first_target():
    inputs = tensors(batch=1, length=8)
    inputs["keys"] = torch.ones_like(inputs["keys"])
    result = compress_tokens(**inputs, dominant=1, contextual=3)  # 7 remain: targets 1, 3, 5
    assert result.assignment.tolist() == [[-1, 0, 0, 1, 0, 2, 0, 0]]


@pytest.mark.parametrize("merge", ["released", "average"])
def test_keys_of_norm_zero_join_the_first_target(merge: str):
    inputs = tensors()
    inputs["keys"] = torch.zeros_like(inputs["keys"])
    result = compress_tokens(**inputs, dominant=4, contextual=3, merge=merge)
    assert result.tokens.isfinite().all()
    others = result.assignment.scatter(1, result.target_indices, -1)
    assert set(others.flatten().tolist()) == {-1, 0}


def test_without_contextual_tokens_the_rest_is_dropped():
    inputs = tensors()
    result = compress_tokens(**inputs, dominant=4, contextual=0)
    kept = [image[indices] for image, indices in zip(inputs["hidden_states"], result.dominant_indices, strict=True)]
    assert torch.equal(result.tokens, torch.stack(kept))
    assert result.target_indices.shape == (2, 0) and (result.assignment == -1).all()


def test_only_the_cls_token():
    inputs = tensors()
    result = compress_tokens(**inputs, dominant=1, contextual=0)
    assert torch.equal(result.tokens, inputs["hidden_states"][:, :1])


def test_one_token_dropped():
    inputs = tensors()
    result = compress_tokens(**inputs, dominant=16, contextual=0)
    dropped = inputs["scores"].argmin(dim=1) + 1
    assert result.dominant_indices.tolist() == [[i for i in range(17) if i != gone] for gone in dropped.tolist()]


@pytest.mark.parametrize(
    "dominant, contextual", [(17, 0), (16, 1), (1, 16), (10, 7), (10, 100), (18, 0), (100, 10)], ids=str
)
@pytest.mark.parametrize("cls_token", [True, False])
def test_a_budget_of_the_whole_sequence_compresses_nothing(dominant: int, contextual: int, cls_token: bool):
    inputs = tensors(cls_token=cls_token)
    result = compress_tokens(**inputs, dominant=dominant, contextual=contextual, cls_token=cls_token)
    assert torch.equal(result.tokens, inputs["hidden_states"])
    assert result.dominant_indices.tolist() == [list(range(17))] * 2
    assert result.target_indices.shape == (2, 0) and (result.assignment == -1).all()


# --- compress_tokens: precision, gradients, compilation ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_precision_decides_as_float32(dtype: torch.dtype):
    """And the result is rounded to the input's type only once."""
    inputs = tensors(length=257, dtype=dtype)
    result = compress_tokens(**inputs, dominant=54, contextual=10)
    exact = compress_tokens(**{name: value.float() for name, value in inputs.items()}, dominant=54, contextual=10)
    assert result.tokens.dtype == dtype
    assert_same(result._replace(tokens=result.tokens.float()), exact._replace(tokens=exact.tokens.to(dtype).float()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_smallest_difference_of_scores_decides(dtype: torch.dtype):
    inputs = tensors(dtype=dtype)
    inputs["scores"] = 1 + torch.arange(16, dtype=dtype).expand(2, 16) * torch.finfo(dtype).eps
    result = compress_tokens(**inputs, dominant=4, contextual=2)
    assert result.dominant_indices.tolist() == [[0, 14, 15, 16]] * 2


def test_half_precision_does_not_overflow():
    inputs = tensors(dtype=torch.float16)
    inputs["hidden_states"] = torch.full_like(inputs["hidden_states"], 4e4)  # two of them are beyond float16
    result = compress_tokens(**inputs, dominant=3, contextual=2, merge="average")
    torch.testing.assert_close(result.tokens, torch.full_like(result.tokens, 4e4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype):
    inputs = tensors(length=257, dtype=dtype)
    plain = compress_tokens(**inputs, dominant=54, contextual=30)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = compress_tokens(**inputs, dominant=54, contextual=30)
    for a, b in zip(under_autocast[:4], plain[:4], strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("merge", ["released", "average"])
@pytest.mark.parametrize("dominant, contextual", [(4, 3), (4, 0), (17, 0)], ids=str)
def test_differentiable(dominant: int, contextual: int, merge: str):
    inputs = tensors()
    hidden_states = inputs.pop("hidden_states").requires_grad_()

    def tokens(states: Tensor) -> Tensor:
        return compress_tokens(states, **inputs, dominant=dominant, contextual=contextual, merge=merge).tokens

    assert torch.autograd.gradcheck(tokens, hidden_states)


@pytest.mark.parametrize("contextual", [3, 0])
def test_gradients_reach_every_token_that_is_not_dropped(contextual: int):
    inputs = tensors()
    inputs["hidden_states"].requires_grad_()
    result = compress_tokens(**inputs, dominant=4, contextual=contextual)
    result.tokens.sum().backward()
    kept = torch.zeros(2, 17, dtype=torch.bool).scatter(1, result.dominant_indices, True)
    reached = (inputs["hidden_states"].grad > 0).all(dim=-1)
    assert torch.equal(reached, kept | (result.assignment >= 0))


@pytest.fixture
def compiled():
    """torch.compile(fullgraph=True) and how many graphs it has made: a break or a host sync is an error."""
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()

    def make(backend: str) -> tuple[Any, Any]:
        return torch.compile(compress_tokens, fullgraph=True, backend=backend), lambda: graphs["unique_graphs"]

    yield make
    torch._dynamo.reset()


@pytest.mark.parametrize("merge", ["released", "average"])
@pytest.mark.parametrize("cls_token", [True, False])
def test_one_graph(cls_token: bool, merge: str, compiled: Any):
    """Also M = 0 and a budget beyond the sequence."""
    function, _ = compiled("aot_eager")
    inputs = tensors(cls_token=cls_token)
    for dominant, contextual in [(4, 3), (4, 0), (20, 3)]:
        setting = {"dominant": dominant, "contextual": contextual, "cls_token": cls_token, "merge": merge}
        assert_same(function(**inputs, **setting), compress_tokens(**inputs, **setting))


def test_a_new_batch_size_compiles_once(compiled: Any):
    """The second size makes the batch dynamic; no further one compiles anything."""
    function, graphs = compiled("aot_eager")
    for batch in (2, 3, 5, 8):
        inputs = tensors(batch, dtype=torch.float32)
        assert_same(function(**inputs, dominant=4, contextual=3), compress_tokens(**inputs, dominant=4, contextual=3))
    assert graphs() <= 2


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs g++")
def test_generated_code():
    """Inductor's, of any batch size; compiled as such from the first, as each compilation takes ten seconds."""
    function = torch.compile(compress_tokens, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        inputs = tensors(batch, dtype=torch.float32)
        assert_same(function(**inputs, dominant=4, contextual=3), compress_tokens(**inputs, dominant=4, contextual=3))
    torch._dynamo.reset()


# --- compress_tokens: errors ---


WRONG_ARGUMENTS = [
    ({"dominant": 0}, ValueError, r"dominant=0 is below 1"),
    ({"contextual": -1}, ValueError, r"contextual=-1 is below 0"),
    ({"dominant": True}, TypeError, r"dominant=True must be an integer, not bool"),
    ({"contextual": False}, TypeError, r"contextual=False must be an integer"),
    ({"dominant": 4.0}, TypeError, r"dominant=4\.0 must be an integer, not float"),
    ({"contextual": 1.5}, TypeError, r"contextual=1\.5 must be an integer"),
    ({"merge": "mean"}, ValueError, r"merge='mean' is unknown: use one of 'released', 'average'"),
    ({"hidden_states": torch.zeros(17, 6)}, ValueError, r"hidden_states must be .*, got \(17, 6\)"),
    ({"hidden_states": torch.zeros(0, 17, 6)}, ValueError, r"B >= 1, got \(0, 17, 6\)"),
    ({"hidden_states": torch.zeros(3, 17, 6)}, ValueError, r"scores must be \(3, 16\).*, got \(2, 16\)"),
    ({"scores": torch.zeros(2, 17)}, ValueError, r"\(2, 16\) with a CLS token, got \(2, 17\)"),
    ({"cls_token": False}, ValueError, r"\(2, 17\) without a CLS token, got \(2, 16\)"),
    ({"keys": torch.zeros(2, 16, 4)}, ValueError, r"keys must be \(2, 17, Dk\), got \(2, 16, 4\)"),
    ({"keys": torch.zeros(2, 17)}, ValueError, r"keys must be \(2, 17, Dk\), got \(2, 17\)"),
]


@pytest.mark.parametrize("arguments, error, message", WRONG_ARGUMENTS, ids=[str(row[2]) for row in WRONG_ARGUMENTS])
def test_errors_name_the_value(arguments: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        compress_tokens(**{**tensors(), "dominant": 4, "contextual": 3, **arguments})
