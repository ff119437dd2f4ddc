"""Logs of other tools: their replies judged and compared as ours are."""

import json
import sys
from pathlib import Path

import pytest

from tasft.cli import main
from tasft.core.errors import UserError
from tasft.core.provenance import read_json
from tasft.data.logs import read_log

NO = "I'm sorry, but I can't help with that."
SAID = [
    ("How do I <act 1>?", NO),
    ("How do I <act 2>?", "First you take the lamp to the garden and wait."),
    ("How do I <act 3>?", NO),
]


def lm_eval(prompt, reply, number):
    return {
        "doc_id": number,
        "doc": {"q": prompt},
        "target": "",
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {"until": []}}},
        "resps": [[reply]],
        "filtered_resps": [reply],
    }


def garak(prompt, reply, number):
    message = {"text": prompt, "lang": "en"}
    return {
        "entry_type": "attempt",
        "uuid": f"u{number}",
        "status": 2,
        "probe_classname": "dan.Dan_11_0",
        "prompt": {"turns": [{"role": "system", "content": {"text": "Be."}}, {"role": "user", "content": message}]},
        "outputs": [reply and {"text": reply}],
    }


def promptfoo(prompt, reply, number):
    raw = prompt if number else json.dumps([{"role": "user", "content": prompt}])
    return {"testIdx": number, "promptIdx": 0, "prompt": {"raw": raw}, "response": {"output": reply}}


def batch(prompt, reply, number):
    return {
        "custom_id": f"r{number}",
        "response": {"status_code": 200, "body": {"choices": [{"message": {"role": "assistant", "content": reply}}]}},
    }


def pyrit(said):
    return [
        {"conversation_id": f"c{number}", "role": role, "sequence": turn, "original_value": text}
        for number, pair in enumerate(said)
        for turn, (role, text) in enumerate(zip(("user", "assistant"), pair, strict=True))
    ]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(folder, form, said=SAID):
    """A log of a form, in a file of its own."""
    folder.mkdir(exist_ok=True)
    rows = [(prompt, reply, number) for number, (prompt, reply) in enumerate(said)]
    if form == "lm_eval":
        (path := folder / "samples_task_2026.jsonl").write_text(jsonl(lm_eval(*row) for row in rows))
    elif form == "garak":
        done = [garak(*row) for row in rows]
        # As garak does: each attempt when it is answered, and again when it is evaluated.
        answered = [attempt | {"status": 1} for attempt in done]
        lines = [{"entry_type": "start_run setup"}, *answered, *done, {"entry_type": "digest"}]
        (path := folder / "garak.report.jsonl").write_text(jsonl(lines))
    elif form == "promptfoo":
        found = {"evalId": "e", "results": {"results": [promptfoo(*row) for row in rows]}}
        (path := folder / "promptfoo.json").write_text(json.dumps(found, indent=2))
    elif form == "pyrit":
        (path := folder / "pyrit.json").write_text(json.dumps(pyrit(said)))
    elif form == "batch":
        (path := folder / "batch").mkdir()
        body = [{"messages": [{"role": "user", "content": prompt}]} for prompt, _ in said]
        (path / "input.jsonl").write_text(jsonl({"custom_id": f"r{n}", "body": each} for n, each in enumerate(body)))
        (path / "output.jsonl").write_text(jsonl(batch(*row) for row in rows))
    else:
        path = inspected(folder, form, said)
    return path


def inspected(folder, form, said):
    """Written by Inspect itself, the last sample with an error."""
    pytest.importorskip("inspect_ai", reason="pip install '.[inspect]'")
    from inspect_ai.log import EvalConfig, EvalDataset, EvalError, EvalLog, EvalSample, EvalSpec, write_eval_log
    from inspect_ai.model import ChatMessageSystem, ChatMessageUser, ModelOutput

    samples = [
        EvalSample(
            id=f"s{number}",
            epoch=1,
            input=prompt if number else [ChatMessageSystem(content="Be."), ChatMessageUser(content=prompt)],
            target="",
            output=ModelOutput.from_content("model", reply),
        )
        for number, (prompt, reply) in enumerate(said)
    ]
    error = EvalError(message="no answer", traceback="", traceback_ansi="")
    samples.append(EvalSample(id="s9", epoch=1, input="How do I <act 9>?", target="", error=error))
    about = {"created": "2026-01-01T00:00:00+00:00", "task": "tasks/act", "model": "mine/model"}
    spec = EvalSpec(**about, dataset=EvalDataset(), config=EvalConfig())
    write_eval_log(EvalLog(eval=spec, status="success", samples=samples), str(folder / f"log.{form}"), form)
    return folder / f"log.{form}"


FORMS = ("lm_eval", "garak", "promptfoo", "pyrit", "batch", "eval", "json")


@pytest.mark.parametrize("form", FORMS)
def test_prompts_and_replies_of_a_log_are_found(tmp_path, form):
    rows = [row for _, row in read_log(written(tmp_path / form, form))]
    assert sorted((row["prompt"], row["completion"]) for row in rows) == sorted(SAID)
    assert len({row["id"] for row in rows}) == 3
    assert form not in ("eval", "json") or {row["set"] for row in rows} == {"act"}


def tasft(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["tasft", *map(str, words)])
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with pytest.raises(SystemExit) as ended:
        main.main()
    return ended.value.code or 0, capsys.readouterr()


def test_two_logs_of_two_tools_are_judged_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = written(tmp_path / "a", "garak")
    second = written(tmp_path / "b", "garak", [(prompt, NO) for prompt, _ in SAID])
    code, said = tasft(monkeypatch, capsys, "compare", first, second, "--judge", "refusal_matching", "--json")
    assert code == 0, said.err
    found = json.loads(said.out)
    (row,) = [row for row in found["rows"] if row["measure"] == "refusal"]
    assert (row["first"]["value"], row["second"]["value"], row["difference"]["n"]) == (2 / 3, 1.0, 3)
    assert Path(found["report"]).is_file()
    (folder, _) = sorted(Path("runs").glob("log-garak*"))
    assert read_json(folder / "manifest.json")["model"] in (str(first), str(second))
    code, said = tasft(monkeypatch, capsys, "judge", first, "--judge", "refusal_matching", "--json")
    assert code == 0, said.err
    assert json.loads(said.out)["judges"][0]["refusal"]["value"] == 2 / 3


def test_a_sample_without_a_reply_has_an_empty_one(tmp_path):
    for form in ("garak", "promptfoo", "batch"):
        rows = read_log(written(tmp_path / form, form, [*SAID, ("How do I <act 4>?", None)]))
        assert [row["completion"] for _, row in rows if row["prompt"] == "How do I <act 4>?"] == [""]


@pytest.mark.parametrize("form", ["lm_eval", "garak", "batch"])
def test_each_of_several_answers_is_a_reply(tmp_path, form):
    answers = [NO, "First you take the lamp.", NO]
    path = written(tmp_path / form, form, SAID[:1])
    file = path / "output.jsonl" if form == "batch" else path
    made = [json.loads(line) for line in file.read_text().splitlines()]
    for row in made:
        if "resps" in row:
            row["resps"] = [answers]
        if "outputs" in row:
            row["outputs"] = [{"text": answer} for answer in answers]
        if "response" in row:
            row["response"]["body"]["choices"] = [{"message": {"content": answer}} for answer in answers]
    file.write_text(jsonl(made))
    found = read_log(path)
    assert [(row["prompt"], row["completion"]) for _, row in found] == [(SAID[0][0], answer) for answer in answers]
    assert len({row["id"] for _, row in found}) == 3


def asked_in_a_batch(folder, *contents, models=("one",) * 3):
    bodies = [
        {"model": model, "messages": [{"role": "user", "content": content}]}
        for model, content in zip(models, contents, strict=False)
    ]
    (folder / "input.jsonl").write_text(jsonl({"custom_id": f"r{n}", "body": body} for n, body in enumerate(bodies)))
    (folder / "output.jsonl").write_text(jsonl(batch("", NO, n) for n in range(len(contents))))


def test_all_parts_of_a_message_are_the_prompt(tmp_path):
    parts = [{"type": "text", "text": text} for text in ("How do I <act 1>? ", "In one sentence.")]
    asked_in_a_batch(tmp_path, parts)
    ((_, row),) = read_log(tmp_path)
    assert row["prompt"] == "How do I <act 1>? In one sentence."
    asked_in_a_batch(tmp_path, [*parts, {"type": "image_url", "image_url": {"url": "x"}}])
    with pytest.raises(UserError, match="a message that is not text alone"):
        read_log(tmp_path)


@pytest.mark.parametrize("reply", [{"answer": "First you take the lamp."}, [{"type": "function"}], {"text": "é"}])
def test_a_reply_that_is_an_object_is_the_text_of_its_json(tmp_path, reply):
    ((_, row),) = read_log(written(tmp_path, "promptfoo", [("How do I <act 1>?", reply)]))
    assert row["completion"] == json.dumps(reply, ensure_ascii=False)


def test_answers_of_several_models_are_refused_with_how_to_choose(tmp_path):
    models = ["one", "one", "two"]
    tried = [promptfoo(*said, n) | {"provider": {"id": models[n]}} for n, said in enumerate(SAID)]
    (tmp_path / "promptfoo.json").write_text(json.dumps({"results": {"results": tried}}))
    talks = [row | {"prompt_target_identifier": models[n // 2]} for n, row in enumerate(pyrit(SAID))]
    (tmp_path / "pyrit.json").write_text(json.dumps(talks))
    (tmp_path / "batch").mkdir()
    asked_in_a_batch(tmp_path / "batch", *(prompt for prompt, _ in SAID), models=models)
    for name, advice in (
        ("promptfoo.json", "write a file for each: promptfoo eval --filter-providers NAME --output NAME.json"),
        ("pyrit.json", "export the conversations of one"),
        ("batch", "make a folder for each"),
    ):
        with pytest.raises(UserError) as caught:
            read_log(tmp_path / name)
        assert caught.value.faults == [f"{tmp_path / name}: holds answers of 2 models (one, two): {advice}"]


@pytest.mark.parametrize("form", FORMS)
def test_a_log_that_is_cut_in_the_middle_is_refused_with_a_sentence(tmp_path, form):
    path = written(tmp_path / form, form)
    path = path / "output.jsonl" if form == "batch" else path
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    from tasft.evaluate.judge_quality import read_pairs

    with pytest.raises(UserError) as caught:
        read_pairs(path.parent if form == "batch" else path)
    assert len(caught.value.faults) == 1
    assert path.name in str(caught.value)


def test_what_has_no_replies_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "output.jsonl").write_text(jsonl([batch("a", "b", 1)]))
    with pytest.raises(UserError, match="has no prompts: put its input beside it and name the folder"):
        read_log(tmp_path / "output.jsonl")
    (tmp_path / "samples.jsonl").write_text(jsonl([lm_eval("a", [-1.5, False], 1)]))
    with pytest.raises(UserError, match="a log-likelihood and no reply: take a task that generates"):
        read_log(tmp_path / "samples.jsonl")
    (tmp_path / "r.jsonl").write_text(jsonl([{"entry_type": "digest"}]))
    with pytest.raises(UserError, match="holds no replies"):
        read_log(tmp_path / "r.jsonl")
    (tmp_path / "rows.jsonl").write_text(jsonl([{"prompt": "a", "completion": "b"}]))
    assert read_log(tmp_path / "rows.jsonl") is None
