"""`cllm review` as a user types it, on a run that was really trained."""

import shutil

from command import cllm


def test_review_ranks_lines_for_people_and_for_programs(run, text, tmp_path):
    (tmp_path / "code").mkdir()
    shutil.copy(text / "bisect.py", tmp_path / "code" / "one.py")
    (tmp_path / "code" / "two.py").write_text("import json\r\n\r\nprint(json)\r\n")
    (tmp_path / "code" / "data.bin").write_bytes(bytes(range(256)))
    ran = cllm("review", run, "code", "--top", 4, "--threads", 1, "--json", cwd=tmp_path)
    result = ran.json
    assert ran.status == 0 and result["files"] == 2 and len(result["surprising"]) == 4 and "reviewing" in ran.err and "passed over" in ran.err
    lines = {name: (tmp_path / name).read_text().splitlines() for name in ("code/one.py", "code/two.py")}
    scores = []
    for each in result["surprising"]:
        assert lines[each["file"]][each["line"] - 1] == each["text"] and each["suggestion"].startswith(each["text"][: each["column"] - 1])
        assert each["bits"] > 0 and each["peak_bits"] > 0 and each["tokens"] > 0
        scores.append(each["score"])
    assert scores == sorted(scores, reverse=True)
    assert cllm("review", run, "code", "--top", 4, "--threads", 3, "--json", cwd=tmp_path).json == result
    shown = cllm("review", run, "code", "--top", 1, "--threads", 1, cwd=tmp_path)
    first = result["surprising"][0]
    assert shown.out.startswith(f"{first['file']}:{first['line']}:{first['column']}: ") and first["text"].strip() in shown.out


def test_a_mistake_gets_one_clear_line(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "word.txt").write_text("x")
    for arguments, words in (
        ([run, tmp_path / "nowhere"], "does not exist"),
        ([run, tmp_path / "binary"], "is no text"),
        ([run, tmp_path / "empty"], "holds no text"),
        ([run, tmp_path / "word.txt"], "no line that could be predicted"),
        ([tmp_path / "empty", tmp_path / "word.txt"], "is not a checkpoint"),
    ):
        ran = cllm("review", *arguments, "--threads", 1)
        assert ran.status != 0 and words in ran.err and ran.err.count("error: ") == 1, ran.err
