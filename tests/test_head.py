"""What a model does to the products of its output head is learned from the model."""

import pytest
import torch
from architectures import VOCABULARY, made_tiny
from conftest import tiny_model, tiny_tokenizer
from peft import LoraConfig, PromptTuningConfig, TrainableTokensConfig
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tasft import TASFTConfig, TASFTTrainer
from tasft.core.errors import UserError
from tasft.loss import nll
from tasft.models.head import Tail, learn_tail, replaced_head

ROWS = [{"prompt": "Hi?", "completion": "It is blue.", "label": True}]
IDS = [5, 90, 17, 33, 61, 200, 8, 44, 120]


def trainer(folder, model, rows=ROWS, **settings):
    arguments = TASFTConfig(output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, kl_rows=0)
    return TASFTTrainer(model, arguments, rows, rows, processing_class=tiny_tokenizer(), **settings)


def own_loss(model, ids):
    """Mean loss of the tokens by the model's own logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return float(F.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:])))


def loss_by_head(model, ids, tail):
    """The same as the losses make it, from the states that the head is given."""
    states = []

    def keep(hidden):
        states.append(hidden)
        return hidden[..., :1]

    with torch.no_grad(), replaced_head(model, keep):
        model(input_ids=torch.tensor([ids]), use_cache=False)
    labels = torch.tensor([*ids[1:], -100])
    return float(nll(states[0][0], tail.head(model), labels).total.detach()) / (len(ids) - 1)


@pytest.mark.parametrize(
    ("name", "settings", "tail"),
    [
        ("llama", {}, Tail()),
        ("gpt2", {}, Tail()),
        ("opt", {}, Tail()),
        ("granite", {"logits_scaling": 6.0}, Tail(1 / 6)),
        ("cohere", {"logit_scale": 0.0625}, Tail(0.0625)),
        ("gemma2", {"final_logit_softcapping": 30.0}, Tail(1.0, 30.0)),
        ("gemma2", {"final_logit_softcapping": None}, Tail()),
        # The name says a divisor in Granite, here a factor.
        ("hyperclovax", {"logits_scaling": 0.125}, Tail(0.125)),
        # Here states are divided before the head is called.
        ("minicpm3", {"dim_model_base": 8}, Tail()),
        ("falcon_h1", {"lm_head_multiplier": 0.0390625}, Tail(0.0390625)),
        ("recurrent_gemma", {"logits_soft_cap": 5.0}, Tail(1.0, 5.0)),
        ("xlstm", {"output_logit_soft_cap": 15.0}, Tail(1.0, 15.0)),
    ],
)
def test_the_map_from_hidden_states_to_logits_is_the_models_own(name, settings, tail):
    model = made_tiny(name, **settings)
    learned = learn_tail(model, IDS)
    assert learned.scale == pytest.approx(tail.scale, rel=1e-6)
    assert learned.softcap == (tail.softcap and pytest.approx(tail.softcap, rel=1e-6))
    assert loss_by_head(model, IDS, learned) == pytest.approx(own_loss(model, IDS), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_architecture_is_learned_or_refused(name):
    model = made_tiny(name)
    if model is None:
        pytest.skip("cannot be made tiny here")
    try:
        tail = learn_tail(model, IDS)
    except UserError:
        return
    assert loss_by_head(model, IDS, tail) == pytest.approx(own_loss(model, IDS), rel=1e-3)


def test_learned_in_bfloat16_it_is_not_rounded_to_it():
    assert learn_tail(made_tiny("granite", logits_scaling=6.0).bfloat16(), IDS).scale == pytest.approx(1 / 6, rel=1e-6)


def changed(after):
    """A model whose logits go through a function."""
    model = tiny_model()
    forward = model.forward

    def other(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = after(output.logits)
        return output

    model.forward = other
    return model


@pytest.mark.parametrize(
    "after",
    [
        lambda z: z.clamp(-20, 20),
        lambda z: z.log_softmax(-1),
        lambda z: z + torch.arange(z.shape[-1]) / 100,
        lambda z: torch.where(torch.arange(z.shape[-1]) < VOCABULARY - 3, z, -torch.inf),
        lambda z: z.flip(-1),
        lambda z: -z,
        lambda z: z[..., :-1],
        lambda z: torch.zeros_like(z),
        lambda z: z * torch.nan,
        lambda z: 30 * torch.sigmoid(z / 30),
    ],
)
def test_logits_that_the_losses_could_not_make_are_refused(after):
    with pytest.raises(UserError, match="output head"):
        learn_tail(changed(after), IDS)


def test_states_beside_the_head_are_refused():
    model = tiny_model()
    head, before = model.lm_head, model.lm_head.forward
    head.forward = lambda hidden: before(hidden * 2)
    with pytest.raises(UserError, match="not those of its weights"):
        learn_tail(model, IDS)


def test_looking_leaves_the_model_as_it_was():
    model = tiny_model().train()
    learn_tail(model, IDS)
    assert model.training
    assert "forward" not in vars(model.lm_head)
    assert not model.lm_head._forward_hooks


def test_a_trainer_uses_what_it_learned(tmp_path):
    """One whose settings name a scale that is used the other way round."""
    model = made_tiny("hyperclovax", logits_scaling=0.125)
    subject = trainer(tmp_path, model)
    ids, labels = subject.train_dataset[0]["input_ids"], subject.train_dataset[0]["labels"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    own = float(F.cross_entropy(logits[:-1], torch.tensor(labels[1:])))
    assert subject.evaluate()["eval_imitate_nll"] == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_the_head_that_an_adapter_replaces_are_refused(tmp_path, tied):
    where = {} if tied else {"lm_head": [1, 2]}
    lora = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=where or [1, 2])
    with pytest.raises(UserError, match="trainable_token_indices"):
        trainer(tmp_path, tiny_model(tied=tied), peft_config=lora)


def test_adapters_whose_head_would_not_be_read_right_are_refused(tmp_path):
    some = TrainableTokensConfig(target_modules=["lm_head"], token_indices=[1])
    # Its states are of more positions than there are tokens.
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    for config in (some, prompt):
        with pytest.raises(UserError, match="output head"):
            trainer(tmp_path, tiny_model(tied=False), peft_config=config)
