from conftest import rows
from test_harvest import ORDINARY, Scripted

from tasft.calibration import calibrate, can_calibrate, limits_of
from tasft.coherence import MIN_REPLIES, NO_LIMITS, Limits
from tasft.engines import Sampling


class Watched(Scripted):
    def generate(self, requests, sampling, name, done=()):
        self.asked = [request.prompt for request in requests]
        self.sampling = sampling
        return super().generate(requests, sampling, name, done)


def test_the_limit_is_that_of_the_least_probable_reply_at_temperature_one(tmp_path):
    engine = Watched({})
    count = len(ORDINARY)
    calibrate(engine, lambda _: list(map(float, range(count))), lambda some: [0.5] * len(some), ORDINARY, 3, tmp_path)
    assert limits_of(tmp_path) == Limits(loss_nats=count - 1, similarity=0.5)
    assert engine.sampling == Sampling(64, temperature=1.0, top_p=1.0, seed=3)
    assert sorted(engine.asked) == sorted(prompt.prompt for prompt in ORDINARY)
    assert len(rows(tmp_path / "replies.jsonl")) == len(ORDINARY)


def test_no_more_than_48_prompts_are_asked_and_the_seed_draws_them(tmp_path):
    def asked(seed):
        engine = Watched({})
        calibrate(engine, lambda replies: [1.0] * len(replies), None, ORDINARY * 3, seed, tmp_path / str(seed))
        return engine.asked

    assert len(asked(1)) == 48
    assert asked(1) != asked(2)


def test_replies_without_a_topic_set_no_limit_of_similarity(tmp_path):
    def similarities(replies):
        return [0.5] * len(replies)

    refusal = "I'm sorry, but I can't help with that."
    spoiled = {prompt.id: text for prompt, text in zip(ORDINARY, (refusal, "", "Yes."), strict=False)}
    asked = []
    calibrate(
        Watched(spoiled),
        lambda replies: [1.0] * len(replies),
        lambda replies: asked.extend(replies) or similarities(replies),
        ORDINARY,
        3,
        tmp_path / "some",
    )
    assert len(asked) == len(ORDINARY) - 3
    mostly = dict.fromkeys((prompt.id for prompt in ORDINARY[: len(ORDINARY) - MIN_REPLIES + 1]), refusal)
    calibrate(Watched(mostly), lambda replies: [1.0] * len(replies), similarities, ORDINARY, 3, tmp_path / "few")
    assert limits_of(tmp_path / "few").similarity is None


def test_without_the_encoder_there_is_no_limit_of_similarity(tmp_path):
    calibrate(Watched({}), lambda replies: [1.0] * len(replies), None, ORDINARY, 3, tmp_path)
    assert limits_of(tmp_path) == Limits(loss_nats=1.0)


def test_few_prompts_give_no_limit(tmp_path):
    assert can_calibrate(ORDINARY[:MIN_REPLIES])
    assert not can_calibrate(ORDINARY[: MIN_REPLIES - 1])
    assert limits_of(tmp_path) == NO_LIMITS
