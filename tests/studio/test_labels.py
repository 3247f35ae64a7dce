"""Labelling through the page's own addresses, from the first answer to a reward model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.models import make_model, make_tokenizer
from tests.studio.folders import client

from tether.cli import main
from tether.runs.labels import LabelSet, NewPair, create_labels

SET = "deep/pairs.labels.db"


def make_set(root: Path, pairs: int = 4) -> TestClient:
    (root / "deep").mkdir(exist_ok=True)
    named = [NewPair(f"question {i}", f"first {i}", f"second {i}") for i in range(1, pairs + 1)]
    create_labels(root / SET, {"name": "pairs", "settings": {"policy": "secret/A"}}, named)
    return client(root)


def following(asking: TestClient, annotator: str = "ann") -> dict[str, Any]:
    reply = asking.get("/api/labels/next", params={"set": SET, "annotator": annotator})
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def say(asking: TestClient, pair: int, answer: str, annotator: str = "ann", **more: Any) -> dict[str, Any]:
    said = {"set": SET, "annotator": annotator, "pair": pair, "answer": answer} | more
    reply = asking.post("/api/labels/answer", json=said)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def test_one_answer_after_the_other(tmp_path: Path) -> None:
    asking = make_set(tmp_path)
    first = following(asking)
    assert first["progress"] == {"done": 0, "total": 4}
    assert first["can_undo"] is False
    assert {first["pair"]["left"], first["pair"]["right"]} == {"first 1", "second 1"}
    reply = say(asking, 1, "left", note="  clearer ")
    assert (reply["ok"], reply["pair"]["id"], reply["progress"], reply["can_undo"]) == (
        *(True, 2),
        {"done": 1, "total": 4},
        True,
    )
    for pair, answer in ((2, "right"), (3, "tie"), (4, "both_bad")):
        last = say(asking, pair, answer)
    assert (last["pair"], last["progress"]) == (None, {"done": 4, "total": 4})
    with LabelSet(tmp_path / SET) as labels:
        assert [answer.note for answer in labels.answers()] == ["clearer", None, None, None]
        chosen = next(labels.preferences())["chosen"]
    assert chosen == first["pair"]["left"]


def test_undo_shows_the_pair_again(tmp_path: Path) -> None:
    asking = make_set(tmp_path)
    say(asking, 3, "left")
    say(asking, 1, "tie")
    undone = asking.post("/api/labels/undo", json={"set": SET, "annotator": "ann"}).json()
    assert (undone["undone"], undone["pair"]["id"], undone["progress"]["done"]) == (1, 1, 1)
    undone = asking.post("/api/labels/undo", json={"set": SET, "annotator": "ann"}).json()
    assert (undone["undone"], undone["pair"]["id"], undone["can_undo"]) == (3, 3, False)
    undone = asking.post("/api/labels/undo", json={"set": SET, "annotator": "ann"}).json()
    assert (undone["undone"], undone["pair"]["id"]) == (None, 1)


def test_chat_prompts_are_given_as_turns_beside_what_the_model_read(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "x"}]
    pairs = [NewPair(chat, "a", "b", text="<s>Be brief.<u>Hi<a>"), NewPair("plain", "a", "b")]
    (tmp_path / "deep").mkdir()
    create_labels(tmp_path / SET, {}, pairs)
    asking = client(tmp_path)
    shown = following(asking)["pair"]
    assert shown["prompt"] == "<s>Be brief.<u>Hi<a>"
    assert shown["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert say(asking, 1, "tie")["pair"]["messages"] is None
    with LabelSet(tmp_path / SET) as labels:
        assert next(labels.preferences())["prompt"] == chat


def test_nothing_tells_whose_answer_it_is(tmp_path: Path) -> None:
    asking = make_set(tmp_path)
    shown = following(asking)
    assert shown["pair"].keys() == {"id", "prompt", "messages", "left", "right"}
    for reply in (shown, asking.get("/api/labels").json(), say(asking, 1, "left")):
        assert "secret" not in json.dumps(reply)


def test_the_list_of_sets(tmp_path: Path) -> None:
    asking = make_set(tmp_path)
    say(asking, 1, "left", "zoë")
    say(asking, 1, "left", "ann")
    say(asking, 2, "skip", "ann")
    (tmp_path / "broken.labels.db").write_text("no database" * 1000)
    broken, pairs = asking.get("/api/labels").json()["sets"]
    assert pairs | {"updated": 0} == {
        "set": SET,
        "name": "pairs",
        "pairs": 4,
        "labelled": 1,
        "annotators": ["ann", "zoë"],
        "updated": 0,
        "fault": None,
    }
    assert "broken.labels.db: damaged or no set of labels" in broken["fault"]
    assert str(tmp_path) not in broken["fault"]


def test_agreement_is_of_what_was_meant_and_counts_are_of_sides(tmp_path: Path) -> None:
    asking = make_set(tmp_path, 40)
    for pair in range(1, 41):
        for annotator in ("ann", "bob"):
            shown = asking.get("/api/labels/next", params={"set": SET, "annotator": annotator}).json()["pair"]
            better = "first" if pair % 3 else "second"
            side = "left" if shown["left"].startswith(better) else "right"
            say(asking, pair, "skip" if pair == 40 and annotator == "bob" else side, annotator)
    say(asking, 1, "tie", "bob")
    found = asking.get("/api/labels/agreement", params={"set": SET}).json()
    ann, bob = found["annotators"]
    assert (ann["name"], ann["done"], ann["left"] + ann["right"]) == ("ann", 40, 40)
    assert (bob["tie"], bob["skip"], bob["done"]) == (1, 1, 40)
    assert ann["left"] not in (0, 40)
    (cohen,) = found["cohen"]
    assert (cohen["a"], cohen["b"], cohen["n"]) == ("ann", "bob", 39)
    assert 0.9 < cohen["kappa"] < 1
    assert found["krippendorff"]["n"] == 39
    assert 0.9 < found["krippendorff"]["alpha"] < 1


def test_names_are_taken_as_people_type_them(tmp_path: Path) -> None:
    asking = make_set(tmp_path)
    say(asking, 1, "left", "  Ada   Lovelace ")
    assert following(asking, "Ada Lovelace")["progress"]["done"] == 1


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"annotator": ""}, 422),
        ({"annotator": "   "}, 422),
        ({"annotator": "x" * 101}, 422),
        ({"annotator": "a\u202eb"}, 422),
        ({"annotator": "a\x00b"}, 422),
        ({"annotator": 7}, 422),
        ({"annotator": None}, 422),
        ({"pair": 0}, 422),
        ({"pair": 2**64}, 422),
        ({"pair": 99}, 404),
        ({"pair": "one"}, 422),
        ({"answer": "a"}, 422),
        ({"answer": None}, 422),
        ({"note": "x" * 10_001}, 422),
        ({"note": ["x"]}, 422),
        ({"more": 1}, 422),
        ({"set": "nothing.labels.db"}, 404),
        ({"set": "../pairs.labels.db"}, 403),
        ({"set": "/etc/passwd.labels.db"}, 403),
        ({"set": "deep"}, 404),
        ({"set": "x\x00.labels.db"}, 404),
    ],
)
def test_unfit_answers_are_refused_in_one_line_and_kept_out(
    tmp_path: Path, change: dict[str, Any], status: int
) -> None:
    asking = make_set(tmp_path)
    said = {"set": SET, "annotator": "ann", "pair": 1, "answer": "left"} | change
    reply = asking.post("/api/labels/answer", json=said)
    assert reply.status_code == status, reply.text
    assert reply.json().keys() == {"error"}
    assert "\n" not in reply.json()["error"]
    assert asking.get("/api/labels").json()["sets"][0]["labelled"] == 0


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 50_000, b'{"annotator": "\\ud800"}']
)
def test_bodies_that_are_no_answers_are_refused(tmp_path: Path, body: bytes) -> None:
    asking = make_set(tmp_path)
    reply = asking.post("/api/labels/answer", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code in (400, 422)
    assert reply.json().keys() == {"error"}


def test_a_damaged_set_is_one_line(tmp_path: Path) -> None:
    asking = make_set(tmp_path)
    (tmp_path / SET).write_bytes((tmp_path / SET).read_bytes()[:5000])
    for reply in (
        asking.get("/api/labels/next", params={"set": SET, "annotator": "ann"}),
        asking.post("/api/labels/answer", json={"set": SET, "annotator": "ann", "pair": 1, "answer": "tie"}),
        asking.get("/api/labels/agreement", params={"set": SET}),
        asking.get("/api/export/preferences.jsonl", params={"set": SET}),
    ):
        assert reply.status_code in (400, 404)
        assert "pairs.labels.db" in reply.json()["error"]


def test_five_hundred_labels_of_two_people_become_a_reward_model(tmp_path: Path) -> None:
    """One likes the longer answer, the other does so mostly; both through the page's own addresses."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdef", k=generator.randint(1, 9))) for _ in range(500)]
    prompts = ["ab", "cd", "ef", "fa", "bd"]
    pairs = [NewPair(prompts[i % 5], texts[2 * i], texts[2 * i + 1] + "e") for i in range(250)]
    create_labels(tmp_path / "pairs.labels.db", {"name": "pairs"}, pairs)
    asking = client(tmp_path)
    answers = 0
    for annotator, care in (("ann", 1.0), ("bob", 0.8)):
        reply = asking.get("/api/labels/next", params={"set": "pairs.labels.db", "annotator": annotator}).json()
        while reply["pair"] is not None:
            pair = reply["pair"]
            difference = len(pair["left"]) - len(pair["right"])
            answer = "tie" if difference == 0 else "left" if difference > 0 else "right"
            if generator.random() > care:
                answer = generator.choice(("left", "right", "tie", "both_bad", "skip"))
            said = {"set": "pairs.labels.db", "annotator": annotator, "pair": pair["id"], "answer": answer}
            reply = asking.post("/api/labels/answer", json=said).json()
            assert reply["ok"] is True
            answers += 1
    assert answers == 500
    found = asking.get("/api/labels/agreement", params={"set": "pairs.labels.db"}).json()
    assert 0.5 < found["krippendorff"]["alpha"] < 1
    exported = asking.get("/api/export/preferences.jsonl", params={"set": "pairs.labels.db"})
    left_out = int(exported.headers["x-tether-skip"]) + int(exported.headers["x-tether-both-bad"])
    assert len(exported.text.splitlines()) == 500 - left_out
    (tmp_path / "preferences.jsonl").write_bytes(exported.content)
    command = ["reward", "--model", str(tmp_path / "model"), "--preferences.path", str(tmp_path / "preferences.jsonl")]
    command += ["--preferences.duplicates", "keep", "--max-steps", "5", "--output", str(tmp_path / "judge")]
    assert main(command) == 0
    evaluation = json.loads((tmp_path / "judge" / "evaluation.json").read_text())
    assert evaluation
    assert (tmp_path / "judge" / "model").is_dir()


def test_who_has_almost_the_name_of_another_is_asked(tmp_path: Path) -> None:
    asking = make_set(tmp_path)
    assert following(asking, "José")["near"] == []
    say(asking, 1, "tie", "José")
    say(asking, 2, "tie", "Jose\u0301")
    say(asking, 1, "tie", "Ann 1")
    for name in ("jose", "JOSÉ", "Jo-se"):
        assert following(asking, name)["near"] == [{"name": "José", "done": 2}]
    for name in ("José", "Jose\u0301", "Josef", "Ann 2", "!"):
        assert following(asking, name)["near"] == []
    say(asking, 1, "left", "jose")  # who says that they are another may go on
    assert following(asking, "jose")["near"] == []
    agreed = asking.get("/api/labels/agreement", params={"set": SET}).json()
    assert [one["name"] for one in agreed["annotators"]] == ["Ann 1", "José", "jose"]
