from conftest import rows
from test_harvest import BENIGN, Scripted

from tasft.judges.calibration import calibrate, can_calibrate, limit_of
from tasft.judges.coherence import MIN_LOSSES
from tasft.models.engine import Sampling


class Watched(Scripted):
    def generate(self, requests, sampling, name, done=()):
        self.asked = [request.prompt for request in requests]
        self.sampling = sampling
        return super().generate(requests, sampling, name, done)


def test_the_limit_is_that_of_the_least_probable_reply_at_temperature_one(tmp_path):
    engine = Watched({})
    calibrate(engine, lambda replies: [float(place) for place in range(len(replies))], BENIGN, 3, tmp_path)
    assert limit_of(tmp_path) == len(BENIGN) - 1
    assert engine.sampling == Sampling(64, temperature=1.0, top_p=1.0, seed=3)
    assert sorted(engine.asked) == sorted(prompt.prompt for prompt in BENIGN)
    assert len(rows(tmp_path / "replies.jsonl")) == len(BENIGN)


def test_no_more_than_48_prompts_are_asked_and_the_seed_draws_them(tmp_path):
    def asked(seed):
        engine = Watched({})
        calibrate(engine, lambda replies: [1.0] * len(replies), BENIGN * 3, seed, tmp_path / str(seed))
        return engine.asked

    assert len(asked(1)) == 48
    assert asked(1) != asked(2)


def test_few_prompts_give_no_limit(tmp_path):
    assert can_calibrate(BENIGN[:MIN_LOSSES])
    assert not can_calibrate(BENIGN[: MIN_LOSSES - 1])
    assert limit_of(tmp_path) is None
