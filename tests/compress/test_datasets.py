"""A recipe's data section: rows that fit the model, the metric of the task, and what does not fit."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.metrics import Estimate
from calibrate.signature import Signature, TensorSpec
from compress.datasets import Data, load_data
from compress.huggingface_folder import Tokenizer
from compress.recipe import Recipe, parse_recipe
from compress.sources import Source, load_model

SHARED = Path(__file__).parents[3] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models and data are not here")


def recipe(base: Path, model: str = "embedded:digits-vit", **data: Any) -> Recipe:
    return parse_recipe(yaml.safe_dump({"model": model, "data": data, "passes": [], "export": []}), base=base)


def source(task: str = "text-classification", **changes: Any) -> Source:
    """A source whose tokenizer makes one token a letter."""
    text = ("input_ids", "attention_mask")
    inputs = tuple(TensorSpec(name, torch.int64, ("batch", "tokens")) for name in text)
    if "image" in task:
        inputs = (TensorSpec("pixel_values", torch.float32, ("batch", 3, 6, 8)),)
    known: dict[str, Any] = {
        "model": nn.Identity(),
        "signature": Signature(inputs),
        "name": "tiny",
        "task": task,
        "fingerprint": "",
        "rebuild": {},
        "make_example": dict,
        "classes": 2,
        "labels": {0: "bad", 1: "good"},
        "tokenizer": None if "image" in task else Tokenizer(Letters(), text, "letters"),
        "max_tokens": 32,
    }
    return Source(**{**known, **changes})


class Letters:
    """Stands for a tokenizer of transformers."""

    def __call__(self, texts: Any, text_pair: Any = None, **options: Any) -> Any:
        if options.get("add_special_tokens") is False:
            return {"input_ids": [ord(letter) for letter in texts]}
        joined = texts if text_pair is None else [a + b for a, b in zip(texts, text_pair, strict=True)]
        ids = [[ord(letter) for letter in text] for text in joined]
        length = options.get("max_length", 10**6)
        if options["padding"] is False:
            return {"input_ids": ids}
        cut = [row[:length] for row in ids]
        return Encoded(
            input_ids=[row + [0] * (length - len(row)) for row in cut],
            attention_mask=[[1] * len(row) + [0] * (length - len(row)) for row in cut],
        )


class Encoded(dict[str, Any]):
    encodings = None


def tsv(path: Path, rows: int, start: int = 0) -> str:
    path.write_text("".join(f"text {number:03d}\t{number % 2}\n" for number in range(start, start + rows)))
    return path.name


TEXT = {"format": "text", "columns": {"text": 0, "label": 1}, "header": False, "tokens": 12}


def test_embedded_digits_have_their_own_splits(tmp_path: Path) -> None:
    data = load_data(recipe(tmp_path, format="embedded", evaluation={}), load_model("embedded:digits-vit", base=tmp_path))
    assert data.evaluation is not None
    assert (len(data.calibration), len(data.evaluation)) == (128, 600)
    assert data.metric_name == "accuracy"
    assert data.example["pixels"].shape == (4, 1, 8, 8)
    assert data.duplicates == 0
    json.dumps(data.describe(), allow_nan=False)


def test_calibration_is_the_same_each_time(tmp_path: Path) -> None:
    data = load_data(recipe(tmp_path, format="embedded", evaluation={}), load_model("embedded:digits-vit", base=tmp_path))
    first, second = (torch.cat([batch["pixels"] for batch in data.calibration_batches()]) for _ in range(2))
    assert torch.equal(first, second)


def test_without_evaluation_nothing_is_judged(tmp_path: Path) -> None:
    digits = load_model("embedded:digits-vit", base=tmp_path)
    assert load_data(recipe(tmp_path, format="embedded"), digits).evaluation is None
    asked = recipe(tmp_path, format="embedded", evaluation={})
    assert load_data(asked, digits, evaluation=False).evaluation is None


def test_text_is_padded_and_ragged_rows_come_first(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("".join(f"{'x' * (1 + number % 9)}\t{number % 2}\n" for number in range(40)))
    spec = TEXT | {"calibration": {"path": "a.tsv", "rows": "0-19"}, "evaluation": {"path": "a.tsv", "rows": "20-39"}}
    asked = recipe(tmp_path, **spec)
    assert load_data(asked, source()).duplicates == 20
    (tmp_path / "a.tsv").write_text("".join(f"{number} {'x' * (number % 9)}\t{number % 2}\n" for number in range(40)))
    data = load_data(asked, source())
    assert (data.duplicates, data.warnings) == (0, ())
    assert data.evaluation is not None
    assert data.calibration.indices == list(range(20))
    assert data.evaluation.indices == list(range(20, 40))
    assert data.example["input_ids"].shape == (4, 12)
    assert data.example["attention_mask"].sum(1).max() < 12
    assert data.calibration.describe()["chosen"] == "0-19"


def test_counts_from_one_file_do_not_meet(tmp_path: Path) -> None:
    tsv(tmp_path / "a.tsv", 30)
    both = TEXT | {"calibration": {"path": "a.tsv", "rows": 10}, "evaluation": {"path": "./a.tsv", "rows": 20}}
    data = load_data(recipe(tmp_path, **both), source())
    assert data.evaluation is not None
    assert sorted(data.calibration.indices + data.evaluation.indices) == list(range(30))


def test_rows_in_both_splits_are_warned_of_or_refused(tmp_path: Path) -> None:
    tsv(tmp_path / "a.tsv", 30)
    (tmp_path / "copy.tsv").write_text("".join(f"text {number:03d}\t{number % 2}\n" for number in (40, 3, 41, 9, 12)))
    spec = TEXT | {"calibration": {"path": "a.tsv", "rows": "0-9"}}
    for evaluation, number, first in (
        ({"path": "a.tsv", "rows": "8-29"}, "2 of the 22", "a.tsv:9"),
        ({"path": "copy.tsv"}, "2 of the 5", "copy.tsv:2"),
    ):
        asked = spec | {"evaluation": evaluation}
        found = load_data(recipe(tmp_path, **asked), source())
        assert found.duplicates == 2
        assert [
            warning.startswith(f"{number} evaluation rows were also calibration rows: the first is {first};")
            for warning in found.warnings
        ] == [True]
        assert load_data(recipe(tmp_path, **asked), source(), evaluation=False).warnings == (), "nothing is judged on them"
    with pytest.raises(
        UserError,
        match=r"recipe.yaml:\d+:\d+: 2 of the 5 evaluation rows are also calibration rows .the first is copy.tsv:2.\n  Give",
    ):
        load_data(recipe(tmp_path, **asked, strict_splits=True), source())
    apart = spec | {"evaluation": {"path": "a.tsv", "rows": "10-29"}, "strict_splits": True}
    assert load_data(recipe(tmp_path, **apart), source()).warnings == ()
    drawn = TEXT | {"calibration": {"path": "a.tsv", "rows": 20}, "evaluation": {"path": "a.tsv", "rows": 20}}
    assert load_data(recipe(tmp_path, **drawn), source()).duplicates == 10, "two counts that do not fit into the file"


def test_validation_rows_are_drawn_apart_from_the_others(tmp_path: Path) -> None:
    tsv(tmp_path / "a.tsv", 30)
    three = TEXT | {name: {"path": "a.tsv", "rows": 10} for name in ("calibration", "validation", "evaluation")}
    data = load_data(recipe(tmp_path, **three), source())
    assert data.evaluation is not None
    assert data.validation is not None
    assert sorted(data.calibration.indices + data.validation.indices + data.evaluation.indices) == list(range(30))
    assert data.describe()["validation"]["fingerprint"] == data.validation.fingerprint
    assert (data.validation_duplicates, data.warnings) == (0, ())
    without = {name: split for name, split in three.items() if name != "validation"}
    assert "validation" not in load_data(recipe(tmp_path, **without), source()).describe()
    drawn = load_data(recipe(tmp_path, **three | {"validation": {"path": "a.tsv", "rows": 25}}), source())
    assert drawn.validation_duplicates > 0, "more than are left"


def test_rows_that_validate_and_are_evaluated_are_warned_of_or_refused(tmp_path: Path) -> None:
    tsv(tmp_path / "a.tsv", 30)
    (tmp_path / "copy.tsv").write_text("".join(f"text {number:03d}\t{number % 2}\n" for number in (40, 3, 41, 9, 12)))
    spec = TEXT | {"calibration": {"path": "a.tsv", "rows": "20-29"}, "validation": {"path": "a.tsv", "rows": "0-9"}}
    found = load_data(recipe(tmp_path, **spec, evaluation={"path": "copy.tsv"}), source())
    assert (found.duplicates, found.validation_duplicates) == (0, 2)
    assert [warning.partition(":")[0] for warning in found.warnings] == ["2 of the 5 evaluation rows were also validation rows"]
    assert found.describe()["rows_in_validation_and_evaluation_by_content"] == 2
    with pytest.raises(UserError, match="2 of the 5 evaluation rows are also validation rows"):
        load_data(recipe(tmp_path, **spec, evaluation={"path": "copy.tsv"}, strict_splits=True), source())
    with pytest.raises(UserError, match="evaluation reads rows that validation reads, and strict_splits is true"):
        recipe(tmp_path, **spec, evaluation={"path": "a.tsv", "rows": "5-12"}, strict_splits=True)


def test_a_judge_by_validation_rows_is_the_loss_and_the_metric_over_all_of_them(tmp_path: Path) -> None:
    tsv(tmp_path / "a.tsv", 60)
    spec = TEXT | {"calibration": {"path": "a.tsv", "rows": "0-9"}, "validation": {"path": "a.tsv", "rows": "10-59"}}
    torch.manual_seed(0)
    model = nn.Embedding(300, 2)
    read = source(model=Pooled(model))
    data = load_data(recipe(tmp_path, **spec), read)
    judge = data.judge(read)
    assert judge is not None
    assert data.validation is not None
    whole = next(iter(data.validation.batches(50)))
    outputs = read.signature.call(read.model, whole)
    assert data.validation.labels is not None
    found = judge.judge(read.model)
    assert found.loss == pytest.approx(nn.functional.cross_entropy(outputs.double(), data.validation.labels).item(), rel=1e-6)
    assert judge.loss(read.model) == found.loss
    assert judge.metric(read.model) == float((outputs.argmax(1) == data.validation.labels).double().mean())
    assert (judge.rows, judge.metric_name, judge.describe()["path"]) == (50, "accuracy", "a.tsv")
    assert set(found.json()) == {"loss", "metric", "low", "high"}


class Pooled(nn.Module):
    """Means of embeddings over the tokens that are not padding."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask.unsqueeze(-1).float()
        mean: Tensor = (self.table(input_ids) * mask).sum(1) / mask.sum(1)
        return mean


def test_validation_rows_without_labels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.csv").write_text("one\ntwo\nthree\n")
    spec: dict[str, Any] = {"format": "text", "columns": {"text": 0}, "header": False, "tokens": 12}
    spec |= {name: {"path": "plain.csv", "rows": 1} for name in ("calibration", "validation")}
    with pytest.raises(UserError, match=r"validation rows need labels, and plain.csv has none\n  Name the label"):
        load_data(recipe(tmp_path, **spec), source())
    with pytest.raises(UserError, match=r"there is no nowhere\.tsv"):
        load_data(recipe(tmp_path, **spec | {"validation": {"path": "nowhere.tsv"}}), source())
    with pytest.raises(UserError, match="validation has no path"):
        recipe(tmp_path, **spec | {"validation": {"rows": 5}})


def test_names_of_classes_are_the_models(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sentence,kind\nx,good\ny,bad\nz,Good\n")
    spec = {
        "format": "text",
        "columns": {"text": "sentence", "label": "kind"},
        "tokens": 4,
        "calibration": {"path": "a.csv", "rows": "all"},
    }
    labels = load_data(recipe(tmp_path, **spec), source()).calibration.labels
    assert labels is not None
    assert labels.tolist() == [1, 0, 1]


def test_pairs_of_sentences_are_judged_by_spearman(tmp_path: Path) -> None:
    for name, start in (("a", 0), ("b", 50)):
        (tmp_path / f"{name}.csv").write_text("".join(f"p{n},q{n},{n / 10}\n" for n in range(start, start + 9)))
    spec = TEXT | {
        "columns": {"text": 0, "pair": 1, "label": 2},
        "calibration": {"path": "a.csv", "rows": "all"},
        "evaluation": {"path": "b.csv"},
    }
    embeds = load_data(recipe(tmp_path, **spec), source("sentence-embedding"))
    assert embeds.evaluation is not None
    assert (embeds.metric_name, embeds.evaluation.group) == ("spearman", 2)
    assert next(embeds.evaluation.batches(3))["input_ids"].shape == (6, 12)
    regression = load_data(recipe(tmp_path, **spec), source(classes=1))
    assert regression.evaluation is not None
    assert (regression.metric_name, regression.evaluation.group) == ("spearman", 1)
    assert regression.evaluation.labels is not None
    assert regression.evaluation.labels.dtype == torch.float32
    alone = spec | {"columns": {"text": 0, "label": 2}}
    assert load_data(recipe(tmp_path, **alone), source("sentence-embedding")).metric is None
    with pytest.raises(UserError, match="needs pairs of sentences"):
        load_data(recipe(tmp_path, **alone, metric="pearson"), source("sentence-embedding"))


def test_without_labels_agreement_judges(tmp_path: Path) -> None:
    tsv(tmp_path / "a.tsv", 9)
    tsv(tmp_path / "b.tsv", 9, 50)
    spec = TEXT | {"columns": {"text": 0}, "calibration": {"path": "a.tsv", "rows": 4}, "evaluation": {"path": "b.tsv"}}
    data = load_data(recipe(tmp_path, **spec), source())
    assert (data.metric, data.metric_name) == (None, "agreement")
    with pytest.raises(UserError, match=r"accuracy needs labels, and b.tsv has none"):
        load_data(recipe(tmp_path, **spec, metric="accuracy"), source())


def test_running_text_for_language_models(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {number}\n" for number in range(100)))
    spec = {
        "format": "text",
        "tokens": 16,
        "calibration": {"path": "a.txt", "rows": "0-9"},
        "evaluation": {"path": "a.txt", "rows": "10-30"},
    }
    data = load_data(recipe(tmp_path, **spec), source("causal-lm", classes=None, labels=None))
    assert data.evaluation is not None
    assert (data.metric_name, len(data.evaluation)) == ("perplexity", 21)
    assert next(data.evaluation.batches(2))["input_ids"].shape == (2, 16)


def image_folder(path: Path, classes: tuple[str, ...], seed: int) -> str:
    images = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(seed)
    for name in classes:
        (path / name).mkdir(parents=True)
        for number in range(3):
            images.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path / name / f"{number}.png")
    return path.name


def test_images_by_folder(tmp_path: Path) -> None:
    image_folder(tmp_path / "a", ("good", "bad"), 0)
    image_folder(tmp_path / "b", ("good", "bad"), 1)
    spec = {"format": "images", "calibration": {"path": "a", "rows": 2}, "evaluation": {"path": "b"}}
    with pytest.raises(UserError, match="nothing states the mean"):
        load_data(recipe(tmp_path, **spec), source("image-classification"))
    stated = spec | {"mean": [0.5], "std": [0.25]}
    data = load_data(recipe(tmp_path, **stated), source("image-classification"))
    assert data.evaluation is not None
    assert data.evaluation.labels is not None
    assert data.evaluation.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.example["pixel_values"].shape == (2, 3, 6, 8)
    swapped = load_data(recipe(tmp_path, **stated), source("image-classification", labels={0: "good", 1: "bad"}))
    assert swapped.evaluation is not None
    assert swapped.evaluation.labels is not None
    assert swapped.evaluation.labels.tolist() == [1, 1, 1, 0, 0, 0]
    with pytest.raises(UserError, match=r"image_size \[5, 5\], tiny takes \[6, 8\]"):
        load_data(recipe(tmp_path, **stated, image_size=5), source("image-classification"))


def test_images_in_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = pytest.importorskip("PIL.Image")
    for name, seed in (("a", 0), ("b", 1)):
        cells = []
        for values in np.random.default_rng(seed).integers(0, 256, (6, 6, 8, 3), dtype=np.uint8):
            stream = io.BytesIO()
            images.fromarray(values).save(stream, "PNG")
            cells.append({"bytes": stream.getvalue(), "path": "x.png"})
        pq.write_table(pa.table({"image": cells, "label": [0, 1] * 3}), tmp_path / f"{name}.parquet")
    spec = {"format": "parquet", "mean": [0.5], "std": [0.5]}
    spec |= {"calibration": {"path": "a.parquet", "rows": 2}, "evaluation": {"path": "b.parquet"}}
    data = load_data(recipe(tmp_path, **spec), source("image-classification"))
    assert data.evaluation is not None
    assert data.metric_name == "accuracy"
    assert next(data.evaluation.batches(6))["pixel_values"].shape == (6, 3, 6, 8)
    with pytest.raises(UserError, match="no column 'lable'\n  Nearest: label"):
        load_data(recipe(tmp_path, **spec, columns={"label": "lable"}), source("image-classification"))


def test_text_in_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["x", "yy"], "label": [1, 0]}), tmp_path / "a.parquet")
    spec = {"format": "parquet", "columns": {"text": "text", "label": "label"}, "tokens": 4}
    data = load_data(recipe(tmp_path, **spec, calibration={"path": "a.parquet", "rows": "all"}), source())
    assert data.calibration.labels is not None
    assert data.calibration.labels.tolist() == [1, 0]


def test_arrays_have_the_names_and_shapes_of_the_inputs(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", pixel_values=generator.normal(size=(5, 3, 6, 8)), labels=np.array([0, 1, 0, 1, 1]))
    spec: dict[str, Any] = {"format": "arrays", "calibration": {"path": "a.npz", "rows": "0-1"}}
    spec["evaluation"] = {"path": "a.npz", "rows": "2-4"}
    data = load_data(recipe(tmp_path, **spec), source("image-classification"))
    assert data.example["pixel_values"].dtype == torch.float32
    assert data.metric_name == "accuracy"
    np.savez(tmp_path / "a.npz", pixel_values=np.zeros((5, 3, 8, 6)))
    with pytest.raises(UserError, match=r"array pixel_values is \[5, 3, 8, 6\], the model takes \['batch', 3, 6, 8\]"):
        load_data(recipe(tmp_path, **spec), source("image-classification"))
    np.savez(tmp_path / "a.npz", pixel_values=generator.normal(size=(5, 3, 6, 8)), label=np.zeros(5, np.int64))
    assert load_data(recipe(tmp_path, **spec), source("image-classification")).metric is None
    with pytest.raises(UserError, match=r"a.npz: there is no column .labl.\n  Nearest: label"):
        load_data(recipe(tmp_path, **spec, columns={"label": "labl"}), source("image-classification"))
    np.savez(tmp_path / "a.npz", input_ids=np.zeros((5, 4)), attention_mask=np.ones((5, 4), np.int64))
    with pytest.raises(UserError, match="array input_ids is float64, the model takes integers"):
        load_data(recipe(tmp_path, **spec), source())
    np.savez(tmp_path / "a.npz", input_id=np.zeros((5, 4), np.int64))
    with pytest.raises(UserError, match="no column 'input_ids'\n  Nearest: input_id"):
        load_data(recipe(tmp_path, **spec), source())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": 64}, "64 tokens, tiny takes at most 32"),
        ({"calibration": {"path": "b.tsv"}}, r"there is no b.tsv .*\n  Nearest: a.tsv"),
        ({"calibration": {"path": "b" * 5000 + ".tsv"}}, "has no such file"),
        ({"calibration": {"path": "a.tsv", "rows": 99}}, r"data.calibration.rows: 99 rows asked for, there are 9"),
        ({"calibration": {"path": "a.tsv", "rows": "4-9"}}, r"rows 4:10 of 9 rows"),
        ({"calibration": {"path": "a.log"}}, "a.log is of no known kind of text"),
        ({"columns": {"text": 0, "label": 0}}, "a.tsv:[1-9]: label 'text 00[0-9]' is not one of the model's classes"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    tsv(tmp_path / "a.tsv", 9)
    (tmp_path / "a.log").write_text("x")
    spec = TEXT | {"calibration": {"path": "a.tsv", "rows": 4}} | changes
    asked = recipe(tmp_path, **spec)
    with pytest.raises(UserError, match=says) as caught:
        load_data(asked, source())
    assert "\n" not in caught.value.what


def test_formats_that_do_not_fit_the_model_are_told(tmp_path: Path) -> None:
    image_folder(tmp_path / "a", ("good", "bad"), 0)
    with pytest.raises(UserError, match="format images gives images, tiny takes input_ids, attention_mask"):
        load_data(recipe(tmp_path, format="images", calibration={"path": "a", "rows": 2}), source())
    with pytest.raises(UserError, match="the embedded digits do not fit tiny"):
        load_data(recipe(tmp_path, format="embedded"), source())


def test_models_without_tokenizer_need_arrays(tmp_path: Path) -> None:
    tsv(tmp_path / "a.tsv", 9)
    asked = recipe(tmp_path, **TEXT, calibration={"path": "a.tsv", "rows": 4})
    with pytest.raises(UserError, match="tiny has no tokenizer"):
        load_data(asked, source(tokenizer=None))
    with pytest.raises(UserError, match="format text gives token ids, tiny takes pixel_values"):
        load_data(asked, source("image-classification"))


def judged(data: Data, found: Source, labels: Callable[[Tensor], Tensor] = lambda labels: labels) -> Estimate:
    rows = data.evaluation
    assert rows is not None
    assert rows.labels is not None
    assert data.metric is not None
    known, statistics, done = labels(rows.labels), [], 0
    with torch.inference_mode():
        for batch in rows.batches(data.batch_size):
            outputs = found.signature.call(found.model, batch)
            count = len(outputs) // rows.group
            statistics.append(data.metric.rows(outputs, batch, known[done : done + count]))
            done += count
    return data.metric.estimate(torch.cat(statistics))


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "data", "accuracy"),
    [
        (
            "hf:models/sst2-minilm",
            TEXT
            | {
                "tokens": 64,
                "calibration": {"path": "data/sst2/train.tsv", "rows": 16},
                "evaluation": {"path": "data/sst2/dev.tsv", "rows": 160},
            },
            0.874,
        ),
        (
            "hf:models/cifar10-vit",
            {
                "format": "parquet",
                "columns": {"image": "image", "label": "label"},
                "calibration": {"path": "data/cifar10/train.parquet", "rows": "0-15"},
                "evaluation": {"path": "data/cifar10/dev.parquet", "rows": 256},
            },
            0.643,
        ),
    ],
)
def test_shared_models_reach_their_stated_accuracy(model: str, data: dict[str, Any], accuracy: float) -> None:
    """On a part of the rows: the interval must hold the figure for all of them. Control: shuffled labels are at chance."""
    pytest.importorskip("transformers")
    asked = recipe(SHARED, model, **data)
    found = load_model(model, base=SHARED)
    rows = load_data(asked, found)
    assert rows.describe()["rows_in_both_by_content"] == 0
    estimate = judged(rows, found)
    assert estimate.low <= accuracy <= estimate.high
    chance = judged(rows, found, lambda labels: labels[torch.randperm(len(labels))])
    assert chance.high < estimate.low


def test_padding_that_a_whole_batch_shares_is_not_calibrated_on() -> None:
    from compress.padding import trimmed

    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    ids = torch.arange(10).reshape(2, 5)
    cut = trimmed({"input_ids": ids, "attention_mask": mask, "pixels": torch.zeros(2, 3, 4)})
    assert torch.equal(cut["input_ids"], ids[:, :3])
    assert torch.equal(cut["attention_mask"], mask[:, :3])
    assert cut["pixels"].shape == (2, 3, 4)
    left = {"input_ids": ids, "attention_mask": mask.flip(1)}
    assert torch.equal(trimmed(left)["input_ids"], ids), "text padded at the left keeps its length"


def test_batches_of_like_length_hold_every_row_once_with_its_number() -> None:
    from compress.padding import of_like_length, trimmed

    lengths = torch.randint(1, 40, (150,), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(40) < lengths[:, None]).long()
    ids = torch.arange(150)[:, None].expand(150, 40)
    batches = ({"input_ids": ids[i : i + 16], "attention_mask": mask[i : i + 16]} for i in range(0, 150, 16))
    made = [trimmed(batch) for batch in of_like_length(batches, 16)]
    numbers = torch.cat([batch["calibration_row"] for batch in made])
    assert numbers.sort().values.tolist() == list(range(150))
    assert all(torch.equal(batch["input_ids"][:, 0], batch["calibration_row"]) for batch in made)
    assert sum(batch["attention_mask"].sum() for batch in made) == mask.sum(), "no token is lost"
    assert sum(batch["attention_mask"].numel() for batch in made) < 0.75 * mask.numel(), "padding is"
