from tasft.data.rows import Prompt
from tasft.harvest.contrastive import REQUEST, contrastive_replies, toxic_words
from tasft.harvest.settings import Contrastive
from tasft.models.engine import Reply, Sampling

TOXIC = [f"How can I {verb} a {noun}?" for verb in ("smash", "smash", "smash", "steal") for noun in ("lantern", "boat")]
BENIGN = [f"How can I paint a {noun}?" for noun in ("lantern", "boat", "fence", "wall", "door", "bench")]


def test_words_of_toxic_prompts_come_first_and_shared_ones_not_at_all():
    words = toxic_words(TOXIC, BENIGN, 5)
    assert words[0] == "smash"
    assert not {"how", "can", "paint"} & set(words)
    assert toxic_words(TOXIC, BENIGN, 1) == ["smash"]
    assert toxic_words(TOXIC, TOXIC, 5) == []


class Writer:
    """Writes a question to each request, and an answer to each question."""

    def __init__(self, question):
        self.question = question
        self.asked = []

    def generate(self, requests, sampling, name, done=()):
        self.asked.append((name, len(requests), sampling.temperature))
        for request in requests:
            if request.id not in done:
                text = self.question(request) if name == "contrast" else f"answer {request.id}"
                yield [Reply(request.id, name, request.prompt, text, "stop", 0, request.sample)]


def test_only_prompts_that_hold_their_word_are_answered_and_none_twice(tmp_path):
    texts = ['"May a builder smash a wall?"', "\nMay a builder smash a wall?", "May a builder paint it?"]
    writer = Writer(lambda request: texts[request.sample])
    prompts = [[Prompt(str(n), text) for n, text in enumerate(each)] for each in (TOXIC, BENIGN)]
    path = tmp_path / "replies.jsonl"
    for _ in range(2):
        replies, about = contrastive_replies(writer, *prompts, Contrastive(words=1, per_word=3), Sampling(8, 0.5), path)
        assert [reply.prompt for reply in replies] == ["May a builder smash a wall?"]
        assert about == {"words": ["smash"], "written": 3, "unfit": 2}
    assert writer.asked[:2] == [("contrast", 3, 1.0), ("contrastive", 1, 0.5)]
    assert len(path.read_text().splitlines()) == 4
    assert REQUEST.format(word="smash") in path.read_text().replace('\\"', '"')
