"""A checkpoint is the same subspace for any number of processes, however they shard it."""

import dataclasses
import itertools
import logging
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save

from ogpsa_trl.data.groups import CapabilityGroup, Sample
from ogpsa_trl.engines.backend import Shard
from ogpsa_trl.method.saved_start import load_start, save_start
from ogpsa_trl.method.saved_state import FILE_NAME, file_names, load_subspace, save_subspace
from ogpsa_trl.method.starting_point import StartingPoint
from ogpsa_trl.method.subspace import CapabilitySubspace
from ogpsa_trl.tensors import gradient_rows, matrices
from runs import paper

SIZES = {"embed": 12, "norm": 3, "head": 7, "unused": 5}
RANK = 2
# The whole basis of a parameter, other numbers for each; one parameter has none.
ROWS = {
    name: 100 * index + torch.arange(RANK * size).float().view(RANK, size)
    for index, (name, size) in enumerate(SIZES.items())
}
ROWS["unused"] = None
# What the processes send of its Gram matrices.
TRIANGLES = torch.stack(
    [torch.zeros(3) if rows is None else gradient_rows.gram(rows).float() for rows in ROWS.values()]
)


def make_subspace(shards, process_index=0, num_processes=1, others_agree=True, **settings):
    """A subspace of one process of several, as if all of them did what this one does."""
    backend = SimpleNamespace(
        parameters=[(name, None) for name in shards],
        shards=[Shard(start, size, SIZES[name]) for name, (start, size) in shards.items()],
        is_sharded=num_processes > 1,
        process_index=process_index,
        num_processes=num_processes,
        device=torch.device("cpu"),
        is_on_all=lambda is_here: is_here and (others_agree or num_processes == 1),
        sum_over_shards=lambda values: TRIANGLES.view_as(values),
        same_on_all=lambda values: values,
    )
    return CapabilitySubspace(backend, paper(**settings))


def part_of(name, start, size):
    rows = ROWS[name]
    return rows[:, start : start + size].contiguous() if rows is not None and size else None


def filled(shards, **process):
    subspace = make_subspace(shards, **process)
    subspace.basis[:] = [part_of(name, *shard) for name, shard in shards.items()]
    subspace.gram = matrices.symmetric(TRIANGLES, RANK)
    subspace.inverse_gram = matrices.inverse_gram(subspace.gram).float()
    subspace.mean_coordinates = torch.ones(len(SIZES), RANK)
    for name in ("mean_square", "rank", "is_waiting", "was_held"):
        setattr(subspace, name, torch.ones_like(getattr(subspace, name)))
    subspace.history.num_steps, subspace.history.interval = torch.tensor(1), torch.tensor(1)
    subspace.is_due = False
    return subspace


def between(size, first, last):
    """The entries of a parameter between two places: where they begin, and how many they are."""
    start, end = (min(max(place, 0), size) for place in (first, last))
    return start, end - start


def by_rows(num_processes, process_index):
    """Every parameter is divided: FSDP2 and ZeRO-3. Small ones leave some processes nothing."""
    of_each = {name: -(-size // num_processes) for name, size in SIZES.items()}
    return {
        name: between(size, of_each[name] * process_index, of_each[name] * (process_index + 1))
        for name, size in SIZES.items()
    }


def end_to_end(num_processes, process_index):
    """One range of all parameters laid end to end: ZeRO-1 and ZeRO-2."""
    per_process = -(-sum(SIZES.values()) // num_processes)
    first, offsets = per_process * process_index, itertools.accumulate(SIZES.values(), initial=0)
    return {
        name: between(size, first - offset, first + per_process - offset)
        for (name, size), offset in zip(SIZES.items(), offsets, strict=False)
    }


def in_replicas(num_processes, process_index):
    """Two replicas of the same shards: HSDP."""
    half = max(num_processes // 2, 1)
    return by_rows(half, process_index % half)


WHOLE = by_rows(1, 0)
layouts = st.tuples(st.sampled_from([by_rows, end_to_end, in_replicas]), st.integers(1, 6))


def processes_of(layout, num_processes):
    return [
        (layout(num_processes, i), {"process_index": i, "num_processes": num_processes})
        for i in range(num_processes)
    ]


def save_all(folder, layout, num_processes):
    for shards, process in processes_of(layout, num_processes):
        save_subspace(filled(shards, **process), str(folder))


def load(folder, shards, **process):
    subspace = make_subspace(shards, **process)
    load_subspace(subspace, str(folder))
    return subspace


def assert_is_whole(subspace, shards):
    assert not subspace.is_due
    for rows, (name, shard) in zip(subspace.basis, shards.items(), strict=True):
        expected = part_of(name, *shard)
        if expected is None:
            assert rows is None or rows.numel() == 0
        else:
            assert torch.equal(rows, expected)


@settings(max_examples=40, deadline=None)
@given(before=layouts, after=layouts)
def test_any_sharding_is_read_by_any_other(before, after, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_all(folder, *before)
    for shards, process in processes_of(*after):
        subspace = load(folder, shards, **process)
        assert_is_whole(subspace, shards)
        saved = filled(shards, **process).state_dict()
        for name, value in subspace.state_dict().items():
            assert name.startswith("basis.") or torch.equal(value, saved[name]), name


def test_a_new_sharding_is_logged(tmp_path, caplog):
    save_all(tmp_path, by_rows, 2)
    with caplog.at_level(logging.INFO):
        load(tmp_path, by_rows(4, 0), num_processes=4)
    assert "is sharded over 2 files: it is sharded anew for 4 processes" in caplog.text


def test_a_process_needs_its_own_file_only(tmp_path):
    """Nobody reads the shards of others where the sharding is the same."""
    save_all(tmp_path, by_rows, 4)
    for name in set(file_names(4)) - {file_names(4)[2]}:
        (tmp_path / name).unlink()
    shards = by_rows(4, 2)
    assert_is_whole(load(tmp_path, shards, process_index=2, num_processes=4), shards)


class TestWithoutAUsableBasis:
    """A warning and a refresh before the next step, on all processes; or an error."""

    def test_a_missing_shard_is_a_warning(self, tmp_path, caplog):
        save_all(tmp_path, by_rows, 4)
        (tmp_path / file_names(4)[1]).unlink()
        assert load(tmp_path, WHOLE).is_due
        assert f"holds no whole capability subspace ({file_names(4)[0]}, " in caplog.text

    def test_so_are_other_settings(self, tmp_path, caplog):
        save_all(tmp_path, by_rows, 1)
        assert load(tmp_path, WHOLE, scope="model").is_due
        assert "was made with the settings {'scope': 'parameter', " in caplog.text

    def test_all_processes_refresh_if_one_has_no_basis(self, tmp_path):
        save_all(tmp_path, by_rows, 1)
        assert load(tmp_path, WHOLE, others_agree=False, num_processes=2).is_due

    @pytest.mark.parametrize(
        ("damage", "shards", "message"),
        [
            (None, {"embed": (0, 12)}, r"does not fit this model.*other parameters.*'head'"),
            (lambda content: b"", WHOLE, r"cannot be read .* delete this file"),
            (lambda content: content[:400], WHOLE, r"cannot be read .* delete this file"),
            (lambda content: b"x" * 100, WHOLE, r"cannot be read .* delete this file"),
            (
                lambda content: save(load_bytes(content), {"format": "2"}), WHOLE,
                r"has format '2', but this version reads '3'",
            ),
        ],
    )  # fmt: skip
    def test_what_is_not_the_subspace_of_this_model_is_an_error(
        self, damage, shards, message, tmp_path
    ):
        save_all(tmp_path, by_rows, 1)
        if damage:
            file = tmp_path / FILE_NAME
            file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(ValueError, match=message):
            load(tmp_path, shards)


class TestStartingPoint:
    CONFIG = paper(capability_loss="kl")

    def save(self, folder, **more):
        samples = [
            Sample(name, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, 2)
            for name in ("skills/0", "skills/1", "language/0")
        ]
        start = StartingPoint(samples, torch.arange(3.0).double())
        return samples, save_start(start, self.CONFIG, str(folder), **more)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ("file", "there is none"),
            ("samples", "of other capability groups, or of more samples"),
            ("settings", "it was measured with the settings {'capability_loss': 'kl', 'kl_tokens'"),
            ("parts", "has fewer samples than `gradients_per_group`"),
        ],
    )
    def test_that_is_lost_is_said(self, change, reason, tmp_path, caplog):
        samples, path = self.save(tmp_path)

        def loaded(config=self.CONFIG, num_parts=1):
            groups = [
                CapabilityGroup(name, [s for s in samples if name in s.name], num_parts, 1, dict)
                for name in ("skills", "language")
            ]
            return load_start(make_subspace(WHOLE).backend, groups, config, str(tmp_path))

        assert torch.equal(loaded().losses, torch.arange(3.0).double())
        if change == "file":
            path.unlink()
        elif change == "samples":
            samples.pop()
        kl_tokens = 3 if change == "settings" else self.CONFIG.kl_tokens
        config = dataclasses.replace(self.CONFIG, kl_tokens=kl_tokens)
        assert loaded(config, num_parts=2 if change == "parts" else 1) is None
        assert f"starting point of {tmp_path} cannot be used (" in caplog.text
        assert reason.lower() in caplog.text.lower()
        assert "drift, and so the divergence, counts from the weights of this" in caplog.text

    def test_has_its_bytes_once_where_files_have_several_names(self, tmp_path, monkeypatch):
        """It never changes: every checkpoint has the file."""
        _, first = self.save(tmp_path / "1")
        _, second = self.save(tmp_path / "2", same=first)
        assert second.samefile(first)

        def no_link(*_):
            raise OSError("Operation not supported")

        monkeypatch.setattr("pathlib.Path.hardlink_to", no_link)
        _, third = self.save(tmp_path / "3", same=first)
        assert not third.samefile(first)
        assert torch.equal(load_file(third)["losses"], load_file(first)["losses"])


@pytest.mark.parametrize("num_before", [1, 4])
def test_saving_replaces_the_files_of_another_number_of_processes(num_before, tmp_path):
    save_all(tmp_path, by_rows, num_before)
    save_all(tmp_path, by_rows, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == file_names(2)
    assert file_names(2)[-1] == "ogpsa_subspace-00002-of-00002.safetensors"
    assert file_names(1) == [FILE_NAME]
