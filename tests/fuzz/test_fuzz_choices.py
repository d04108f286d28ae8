"""Files of questions may be anything: questions that can be asked, or one sentence, never a traceback."""

import json

from fuzz_values import DEEP_JSON, JSON, cut_or_changed, fuzz, mutated, told
from hypothesis import example, given
from hypothesis import strategies as st

from maxlm.data.tokenizer import ByteTokenizer
from maxlm.evaluate.choices import encode_pair, read_questions
from maxlm.evaluate.scoring import EvaluationError

QUESTION = {"question": "2 + 2 =", "choices": ["3", " 4", "five"], "answer": 1}
LINE = json.dumps(QUESTION).encode() + b"\n"
NAME = "q.jsonl"


def ask(data: bytes) -> None:
    """Reads a file of questions, which are refused or can be encoded."""
    lines, tokenizer = data.splitlines(keepends=True), ByteTokenizer()
    try:
        questions = read_questions(lines, NAME)
    except EvaluationError as error:
        told(error, NAME)
        return
    for question in questions:
        assert 0 <= question.answer < len(question.choices)
        for continuation in question.continuations:
            context, following = encode_pair(tokenizer, question.context, continuation)
            assert context and following


@fuzz(400)
@given(
    st.binary(max_size=60)
    | cut_or_changed(2 * LINE)
    | (mutated(QUESTION) | JSON).map(lambda value: LINE + json.dumps(value).encode())
)
@example(b"")
@example(b"\xff\xfe" + LINE)
@example(DEEP_JSON[0])
@example(DEEP_JSON[1])
@example(b'{"question": "a\\ud800", "choices": ["b", "c"], "answer": 0}')
@example(b'{"question": "a", "choices": ["b", "\\u0000"], "answer": 0}')
@example(b'{"question": "a", "question": "b", "choices": ["b", "c"], "answer": 0}')
@example(b'{"question": " ", "choices": ["b", "c"], "answer": 1}')
@example(b'{"question": "a", "choices": ["b", "c"], "answer": ' + b"9" * 5000 + b"}")
@example(b'{"question": "a", "choices": {"b": 1, "c": 2}, "answer": 0}')
@example(b'{"question": "a", "choices": ["b", "c"], "answer": true}')
def test_a_file_of_questions_may_hold_any_bytes(data):
    ask(data)
