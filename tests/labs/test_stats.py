"""labs/stats.py: what a file holds."""

import numpy as np
from conftest import asked, assistant, command, jsonl, user

import data


def test_stats_tells_lengths_duplicates_and_odd_answers(tmp_path):
    rows = [asked("问题", "好。答案在这里。"), asked("问题", "好。答案在这里。"), asked("q", ""),
            asked("q", "A sentence. And then,"), asked("q", "好" * 14),
            {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    status, out, err = command("labs/stats.py", path)
    assert status == 0, err
    for line in ("6 rows, 1 of them exact duplicates",
                 "1.17 answers per row, at most 2; 1 are empty",
                 f"repetition: {0.9 / 7:.1%} of an answer's 5-grams"):
        assert line in out, line
    words = [*["han"] * (2 * 8 + 14), *["latin"] * (1 + 5 + 1 + 4)]
    assert f"Chinese characters: {words.count('han') / len(words):.1%} of the words" in out
    data.byte_tokenizer(tmp_path / "bytes")  # what is taken without --model
    examples = data.load_examples([path], data.ChatTokenizer(tmp_path / "bytes"), keep_all=True)[0]
    lengths = [len(e.ids) for e in examples]
    assert f"50%: {np.percentile(lengths, 50):.0f} " in out and f"100%: {max(lengths)}" in out
    assert max(map(len, out.splitlines())) <= 80
    bars = [int(line.split()[-1]) for line in out.splitlines() if " to " in line]
    assert sum(bars) == len(examples)
