"""Instruction data: every fault of a line by name, templates, masks on real text, truncation, buckets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metagradient.data.chat import TEMPLATES, Buckets, encode
from metagradient.data.instructions import Instruction, Message, by_task, read, write
from metagradient.data.vocabulary import load_tokenizer, trained
from metagradient.errors import ConfigError, DataError

pytest.importorskip("tokenizers")

MARKS = (
    *("<|im_start|>", "<|im_end|>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *TEMPLATES["plain"].marks,
)
TALK = Instruction(
    "chat",
    "talk",
    (
        Message("user", "Name a colour, née <|im_end|> now."),
        Message("assistant", "Blue 42."),
        Message("user", "Another?"),
        Message("assistant", "Rötlich!"),
    ),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = ["Name a colour, please, now. Another? Blue 42. Which is the number of the day?"] * 4
    return trained(texts, 400, MARKS)


def line(**changes: Any) -> bytes:
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "7"}]
    row = {"dataset": "d", "id": "i", "messages": messages, **changes}
    return json.dumps({k: v for k, v in row.items() if v != "absent"}).encode()


def of(answer: Any, role: str = "assistant") -> list[dict[str, Any]]:
    return [{"role": "user", "content": "How many?"}, {"role": role, "content": answer}]


# Reading and writing


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"dataset": "d", "id": "x", "messages": [', "not JSON"),
        (b'{"dataset": "d\xff"}', "not UTF-8: at byte 14"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (line(id="absent"), "no field id"),
        (line(id=5), "no field id"),
        (line(dataset="absent"), "no field dataset"),
        (line(messages="absent"), "no field messages"),
        (line(messages=[]), "no field messages"),
        (line(messages=["hello"]), "without content"),
        (line(messages=of(None)), "without content"),
        (line(messages=of(" \n")), "an empty answer"),
        (line(messages=of("ok", role="user")), "no answer"),
        (line(messages=of("ok", role="robot")), "unknown role: 'robot'"),
        (line(messages=of("\ud800")), "lone surrogate"),
        (line(id="first"), "a repeated id: first"),
    ],
)
def test_a_faulty_line_is_named_counted_and_skipped(bad: bytes, reason: str, tmp_path: Path):
    path = tmp_path / "pool.jsonl"
    path.write_bytes(b"\n".join([line(id="first"), bad, b"", line(id="last")]) + b"\n")
    found, summary = read(path)
    assert [one.id for one in found] == ["first", "last"]
    (skipped,) = summary.skipped
    assert (skipped.file, skipped.line) == (str(path), 2)
    assert reason in skipped.reason
    assert f"pool.jsonl:2: {skipped.reason}" in str(summary)
    assert "2 conversations read, 1 lines skipped" in str(summary)


def test_a_last_line_that_was_cut_off_is_a_faulty_one(tmp_path: Path):
    (tmp_path / "pool.jsonl").write_bytes(line(id="whole") + b"\n" + line(id="torn")[:-9])
    found, summary = read(tmp_path / "pool.jsonl")
    assert [one.id for one in found] == ["whole"]
    assert summary.skipped[0].line == 2


def test_a_file_that_is_absent_or_holds_no_conversation_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="can't be read"):
        read(tmp_path / "absent.jsonl")
    (tmp_path / "bad.jsonl").write_bytes(b"{}\n")
    with pytest.raises(DataError, match=r"no conversation.*bad\.jsonl:1: no field dataset"):
        read(tmp_path / "bad.jsonl")


def test_what_is_written_is_read_again(tmp_path: Path):
    one = Instruction("d", "ü", (Message("user", "a\nb"), Message("assistant", "π")), {"task": "t", "count": 2})
    write(tmp_path / "out.jsonl", [one, TALK])
    assert read(tmp_path / "out.jsonl")[0] == [one, TALK]
    assert read(tmp_path / "out.jsonl", limit=1)[0] == [one]
    assert list(json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])) == [
        *("dataset", "id", "task", "count", "messages")
    ]


def test_the_shared_pool_and_target_are_read_whole(shared_data):
    pool, summary = read(shared_data("instructions") / "pool.jsonl")
    assert (len(pool), summary.skipped) == (12_000, ())
    target, _ = read(shared_data("instructions") / "targets" / "bbh.jsonl")
    tasks = by_task(target)
    assert len(tasks) == 9
    assert all(len(rows) == 130 for rows in tasks.values())


# Templates and masks


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("plain", "<|user|>A<|end|><|assistant|>B<|end|>"),
        ("chatml", "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"),
        (
            "smollm2",
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>",
        ),
        ("gemma", "<bos><start_of_turn>user\nA<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>\n"),
    ],
)
def test_templates_write_what_their_models_were_tuned_on(name: str, written: str):
    one = Instruction("d", "i", (Message("user", "A"), Message("assistant", "B")))
    assert "".join(text for text, _, _ in TEMPLATES[name].pieces(one)) == written


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_assistants_words_and_the_end_of_its_turns_are_learnt(name: str, tokenizer: Any):
    encoded = encode([TALK], tokenizer, TEMPLATES[name], 200)
    learnt = encoded.weights[0] > 0
    end = TEMPLATES[name].tail
    text = tokenizer.decode(encoded.targets[0][learnt].tolist(), skip_special_tokens=False)
    assert text == f"Blue 42.{end}Rötlich!{end}"
    assert encoded.weights[0].sum() == pytest.approx(1)
    used = encoded.used[0]
    np.testing.assert_array_equal(encoded.targets[0, : used - 1], encoded.tokens[0, 1:used])
    assert not encoded.tokens[0, used:].any()
    assert not encoded.weights[0, used:].any()
    assert not encoded.cut[0]


def test_a_mark_that_somebody_wrote_stays_text(tokenizer: Any):
    encoded = encode([TALK], tokenizer, TEMPLATES["chatml"], 200)
    end = tokenizer.token_to_id("<|im_end|>")
    # Four turns end; the one in the question is spelled out.
    assert np.count_nonzero(encoded.tokens == end) == 4
    text = tokenizer.decode(encoded.tokens[0, : encoded.used[0]].tolist(), skip_special_tokens=False)
    assert "née <|im_end|> now." in text


def test_a_long_conversation_keeps_the_questions_end_and_the_answers_start(tokenizer: Any):
    one = Instruction("d", "i", (Message("user", "number " * 40 + "day?"), Message("assistant", "Blue 42.")))
    encoded = encode([one], tokenizer, TEMPLATES["plain"], 32)
    text = tokenizer.decode(encoded.tokens[0].tolist(), skip_special_tokens=False)
    assert encoded.cut[0]
    assert encoded.used[0] == 32
    assert text.endswith("day?<|end|><|assistant|>Blue 42.")
    assert not text.startswith("<|user|>")

    answered = Instruction("d", "i", (Message("user", "Which day?"), Message("assistant", "number " * 60 + "Blue.")))
    encoded = encode([answered], tokenizer, TEMPLATES["plain"], 32)
    text = tokenizer.decode(encoded.tokens[0].tolist(), skip_special_tokens=False)
    assert encoded.cut[0]
    assert "<|assistant|>number number" in text
    assert "Blue" not in text
    assert "day?" in text
    # At least a quarter is for what comes before the answer, where there is as much.
    before = Instruction("d", "i", (Message("user", "day " * 60), Message("assistant", "number " * 60)))
    encoded = encode([before], tokenizer, TEMPLATES["plain"], 32)
    assert np.count_nonzero(encoded.weights[0] == 0) == 8 - 1


@pytest.mark.parametrize("length", [8, 15, 40])
def test_every_answer_keeps_a_token_to_learn_whatever_is_cut(length: int, tokenizer: Any, shared_data):
    pool, _ = read(shared_data("instructions") / "pool.jsonl", limit=200)
    encoded = encode(pool, tokenizer, TEMPLATES["plain"], length)
    assert np.all(encoded.answers >= 1)
    np.testing.assert_allclose(encoded.weights.sum(1), 1, rtol=1e-5)
    assert np.all(encoded.used <= length)
    whole = encode(pool, tokenizer, TEMPLATES["plain"], 4000)
    assert not whole.cut.any()
    np.testing.assert_array_equal(encoded.cut, whole.used > length)
    starts = [int(np.flatnonzero(w)[0]) for w in encoded.weights]
    firsts = [int(np.flatnonzero(w)[0]) for w in whole.weights]
    for row in range(200):
        # An answer's first token is learnt, at whatever length.
        assert encoded.targets[row, starts[row]] == whole.targets[row, firsts[row]]


def test_what_cannot_be_encoded_is_refused(tokenizer: Any):
    with pytest.raises(ConfigError, match="no token '<end_of_turn>'"):
        encode([TALK], trained(["abc"], 300, TEMPLATES["plain"].marks), TEMPLATES["gemma"], 40)
    with pytest.raises(ConfigError, match="at least 8"):
        encode([TALK], tokenizer, TEMPLATES["plain"], 7)
    with pytest.raises(DataError, match="no conversations"):
        encode([], tokenizer, TEMPLATES["plain"], 40)


# Buckets


def test_buckets_hold_every_conversation_once_at_its_own_length(tokenizer: Any, shared_data):
    pool, _ = read(shared_data("instructions") / "pool.jsonl", limit=150)
    encoded = encode(pool, tokenizer, TEMPLATES["plain"], 100)
    rows = np.arange(0, 150, 2)
    batches = Buckets(encoded, 16, 32, rows)
    seen = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(np.sort(seen), rows)
    for batch in batches:
        length = batch["tokens"].shape[1]
        assert length in (32, 64, 96, 100)
        used = encoded.used[batch["index"]]
        assert used.max() <= length
        assert length == min(100, -(-used.max() // 32) * 32)
        np.testing.assert_array_equal(batch["targets"], encoded.targets[batch["index"], :length])
        np.testing.assert_allclose(batch["weights"].sum(1), 1, rtol=1e-5)
    assert {len(batch["index"]) for batch in list(batches)[:-1]} == {16}
    # Shorter ones first, and little padding.
    padding = sum(batch["tokens"].size for batch in batches) / encoded.used[rows].sum()
    assert padding < 1.5


# Vocabulary


def test_a_vocabulary_writes_any_text_and_is_the_same_each_time(tmp_path: Path):
    texts = ["To be, or not to be: that is the question. 1601", "Whether 'tis nobler in the mind to suffer"] * 3
    made = trained(texts, 300, ("<|end|>",))
    assert made.get_vocab_size() <= 300
    assert made.token_to_id("<|end|>") == 0
    for text in ["naïve 🙂 \n\t  x", texts[0]]:
        assert made.decode(made.encode(text, add_special_tokens=False).ids) == text
    assert len(made.encode("1601", add_special_tokens=False).ids) == 4
    assert len(made.encode("to be", add_special_tokens=False).ids) < 5
    assert trained(texts, 300, ("<|end|>",)).get_vocab() == made.get_vocab()
    made.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).get_vocab() == made.get_vocab()
    with pytest.raises(ConfigError, match="256 bytes and 1 marks"):
        trained(texts, 256, ("<|end|>",))


def test_a_tokenizer_that_is_absent_or_damaged_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json can't be read"):
        load_tokenizer(tmp_path)
