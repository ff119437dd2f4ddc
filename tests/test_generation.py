"""What decides replies, where they end, and what of them is the answer."""

import json

import pytest
import torch
from architectures import made_tiny
from conftest import tiny_model, tiny_tokenizer
from test_encode import one, spans, thinker
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, Gemma3TextConfig, GenerationConfig, PreTrainedTokenizerFast, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tasft.core.errors import UserError
from tasft.data.rows import Example, Prompt
from tasft.data.template import THOUGHTS, Writer, answer_in, decoded, special_tokens
from tasft.evaluate.safety import answer
from tasft.models import local
from tasft.models.cache import ROOM, RoomyLayer, make_room
from tasft.models.engine import Reply, Sampling, requests_for, thoughts
from tasft.models.generation import context_of, end_tokens, from_nucleus, overruled
from tasft.models.load import add_lora
from tasft.models.local import TransformersEngine

PROMPTS = [Prompt(f"p{number}", "Why?" * (number + 1)) for number in range(3)]
SAID = [
    {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 2},
    {"num_beams": 3},
    {"stop_strings": ["e"]},
    {"max_time": 1e-6},
    {"min_new_tokens": 8},
    {"min_length": 200},
    {"max_length": 3},
    {"guidance_scale": 4.0},
    {"forced_eos_token_id": 9},
    {"forced_bos_token_id": 9},
    {"bad_words_ids": [[300], [301]]},
    {"suppress_tokens": list(range(270, 300))},
    {"begin_suppress_tokens": list(range(270, 330))},
    {"sequence_bias": [[[300], -50.0]]},
    {"num_return_sequences": 2, "do_sample": True},
    {"do_sample": True, "temperature": 9.0, "top_k": 5, "top_p": 0.5, "min_p": 0.2, "typical_p": 0.3},
    {"epsilon_cutoff": 0.2, "eta_cutoff": 0.2},
    {"exponential_decay_length_penalty": (1, 5.0)},
    {"encoder_repetition_penalty": 3.0},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"dola_layers": "high"},
    {"prompt_lookup_num_tokens": 3},
    {"output_scores": True, "return_dict_in_generate": True},
    {"cache_implementation": "static"},
    {"remove_invalid_values": True, "renormalize_logits": True},
    {"watermarking_config": {"bias": 9.0}},
    {"token_healing": True},
]


def speaking():
    model = tiny_model(tied=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[-40:] *= 30
    return model


def told(engine, sampling, **more):
    batches = engine.generate(requests_for(PROMPTS, **more), sampling, "s")
    return {reply.id: reply for batch in batches for reply in batch}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("said", SAID, ids=lambda said: next(iter(said)))
def test_sampling_alone_decides_replies(said, adapted):
    model = speaking()
    if adapted:
        model = add_lora(model, r=2, lora_alpha=2, lora_dropout=0.0, target_modules=["q_proj"])
    engine = TransformersEngine(model, tiny_tokenizer(), "chat")
    samplings = (Sampling(12), Sampling(12, 1.0, seed=3))
    wanted = [told(engine, sampling) for sampling in samplings]
    streamed = list(engine.stream("Why?", samplings[0]))
    owner = model.get_base_model() if adapted else model
    owner.generation_config = kept = GenerationConfig(eos_token_id=0, pad_token_id=0, **said)
    heard = [told(engine, sampling) for sampling in samplings]
    assert heard == wanted
    assert list(engine.stream("Why?", samplings[0])) == streamed
    assert owner.generation_config is kept


def test_what_decided_is_written_beside_the_replies(tmp_path):
    model = speaking()
    model.generation_config = GenerationConfig(
        eos_token_id=0, do_sample=True, temperature=0.7, repetition_penalty=1.1, suppress_tokens=None
    )
    engine = TransformersEngine(model, tiny_tokenizer(), "chat")
    answer(engine, {"name": "s"}, PROMPTS, Sampling(3), tmp_path)
    drawn = json.loads((tmp_path / "set.json").read_text())["drawn"]
    assert drawn["sampling"] == {"max_new_tokens": 3, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert drawn["ends"] == ["<|end|>"]
    assert drawn["overruled"] == {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.1}
    assert overruled(tiny_model()) == {}


# --- Where a reply ends -----------------------------------------------------------------------


def test_a_reply_ends_where_rows_teach_it_to():
    """The tokenizer ends with one token, the chat template ends turns with another."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    tokenizer.eos_token = "<|endoftext|>"
    model = tiny_model()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end_tokens(model, tokenizer, "chat") == sorted([end, tokenizer.eos_token_id])
    assert end_tokens(model, tokenizer, "alpaca") == [tokenizer.eos_token_id]


def test_a_mark_that_was_not_added_as_a_special_token_ends_a_turn_too():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_end|>"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|im_end|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in special_tokens(tokenizer)
    assert end_tokens(tiny_model(), tokenizer, "chat") == [tokenizer.eos_token_id, end]
    assert spans(one(Example("Hi?", "Yes", True), tokenizer), tokenizer) == ["Yes<|im_end|>"]
    assert spans(one(Example("Hi?", "Yes", False), tokenizer), tokenizer) == ["Yes"]


def test_a_turn_that_ends_with_two_tokens_is_learned_to_its_last():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|begin|>", "<|done|>", "<|turn|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<|begin|>{{ m.content }}<|done|>"
        "{% else %}{{ m.content }}{% endif %}<|turn|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert spans(one(Example("Hi?", "Yes", True), tokenizer), tokenizer) == ["<|begin|>Yes<|done|><|turn|>"]
    assert spans(one(Example("Hi?", "Yes", False), tokenizer), tokenizer) == ["Yes"]
    penalised = one(Example("Hi?", "Yes", False), tokenizer, penalize_eos=True)
    assert spans(penalised, tokenizer) == ["Yes<|done|>"]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = one(Example(talk, "d", True), tokenizer, turns="all")
    assert spans(row, tokenizer) == ["<|begin|>b<|done|><|turn|>", "<|begin|>d<|done|><|turn|>"]
    ends = tokenizer.convert_tokens_to_ids(["<|done|>", "<|turn|>", "<|end|>"])
    assert end_tokens(tiny_model(), tokenizer, "chat") == sorted(ends)


# --- Answers and thoughts ---------------------------------------------------------------------


def channels():
    """As gpt-oss': what a reply says has a name, in marks that are no text."""
    tokenizer = tiny_tokenizer()
    marks = ["<|start|>", "<|message|>", "<|channel|>", "<|return|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
        "<|message|>{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize(
    ("make", "text", "said", "thought"),
    [
        (channels, "<|channel|>final<|message|>A pile.", "A pile.", False),
        (
            channels,
            "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant<|channel|>final<|message|>Sure",
            "Sure",
            True,
        ),
        (channels, "<|channel|>analysis<|message|>They ask how", "", True),
        (channels, "Sure", "Sure", False),
        (thinker, "<think>\nThey ask.\n</think>\n\nSure", "Sure", True),
        (thinker, "<think>\n\n</think>\n\nSure", "Sure", False),
        (thinker, "<think>\nThey ask", "", True),
        (thinker, "Sure <think> is a word", "Sure <think> is a word", False),
        (
            tiny_tokenizer,
            "<think>\nno mark of this model</think>Sure",
            "<think>\nno mark of this model</think>Sure",
            False,
        ),
    ],
)
def test_the_answer_is_what_comes_after_the_thought(make, text, said, thought):
    tokenizer = make()
    writer = Writer(tokenizer, "chat")
    found = writer.said(writer.prompt("Hi?"), tokenizer(text, add_special_tokens=False).input_ids)
    assert found.answer.strip() == said
    assert bool(found.thought) == thought
    assert ("They ask" in found.thought) == thought


def test_a_prompt_may_open_the_thought():
    tokenizer = thinker()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    )
    writer = Writer(tokenizer, "chat")
    assert writer.thinks
    cut, whole = (
        writer.said(writer.prompt("Hi?"), tokenizer(text, add_special_tokens=False).input_ids)
        for text in ("They ask", "They ask</think>Sure")
    )
    assert (cut.answer, cut.thought) == ("", "They ask")
    assert (whole.answer, whole.thought) == ("Sure", "They ask</think>")


def test_who_thinks_is_seen_in_the_template():
    assert Writer(channels(), "chat").thinks
    assert Writer(thinker(), "chat").thinks
    assert not Writer(thinker(), "chat", {"enable_thinking": False}).thinks
    assert not Writer(tiny_tokenizer(), "chat").thinks


def test_thoughts_are_counted_apart():
    replies = [
        Reply("a", "s", "?", "Sure", "stop", 0, 0, "<think>x</think>"),
        Reply("b", "s", "?", "", "length", 0, 0, "<think>x"),
        Reply("c", "s", "?", "", "stop", 0, 0),
    ]
    assert thoughts(replies) == {"n": 2, "unfinished": 1}


# --- Text -------------------------------------------------------------------------------------


def sentencepiece(template=None):
    """Words begin with a mark that stands for a space, as Llama 2's: the first of a text gets one of its own."""
    words = ["▁Sure", "Sure", "▁here", "▁is", "▁it", "▁a", "▁Response", "Response"]
    alphabet = sorted(set("▁" + "".join(map(chr, range(33, 127))) + "".join(words)))
    tokens = ["<unk>", "<s>", "</s>", "\n", *alphabet]
    merges = []
    for word in words:
        for stop in range(2, len(word) + 1):
            if word[:stop] not in tokens:
                tokens.append(word[:stop])
                merges.append((word[: stop - 1], word[stop - 1]))
    model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.chat_template = template
    return fast


LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def tokens_of(tokenizer, row):
    return tokenizer.convert_ids_to_tokens([label for label in row["labels"] if label != -100])


def test_what_a_template_writes_between_a_reply_and_its_end_is_not_penalised():
    tokenizer = sentencepiece(LLAMA2)
    assert tokens_of(tokenizer, one(Example("a", "Sure here", False), tokenizer)) == ["▁Sure", "▁here"]
    learned = tokens_of(tokenizer, one(Example("a", "Sure here", True), tokenizer))
    assert learned == ["▁Sure", "▁here", "▁", "</s>"]
    penalised = tokens_of(tokenizer, one(Example("a", "Sure here", False), tokenizer, penalize_eos=True))
    assert penalised == ["▁Sure", "▁here", "</s>"]


def test_a_reply_begins_with_the_token_that_the_model_would_write():
    tokenizer = sentencepiece()
    row = one(Example("a", "Sure here", False), tokenizer, style="alpaca")
    assert tokens_of(tokenizer, row) == ["Sure", "▁here"]
    writer = Writer(tokenizer, "alpaca")
    ids, begin = writer.reply("a", "Sure")
    assert tokenizer.convert_ids_to_tokens(ids[begin:]) == ["Sure"]
    assert ids[:begin] == writer.prompt("a")
    chat = Writer(sentencepiece(LLAMA2), "chat")
    ids, begin = chat.reply("a", "Sure here")
    assert tokenizer.convert_ids_to_tokens(ids[begin:]) == ["▁Sure", "▁here"]


def test_words_after_a_prefix_keep_their_space():
    tokenizer = sentencepiece(LLAMA2)
    engine = TransformersEngine(made_tiny("llama", vocab_size=len(tokenizer)), tokenizer, "chat")
    said = local._Drawn(tokenizer.convert_tokens_to_ids(["▁is", "▁it"]), "stop", None)
    engine._generate = lambda rows, *_: [said] * len(rows)
    assert {reply.completion for reply in told(engine, Sampling(4), prefix="Sure here").values()} == {"Sure here is it"}
    assert {reply.completion for reply in told(engine, Sampling(4)).values()} == {"is it"}
    assert engine.complete(["Sure here"], Sampling(4)) == [" is it"]


def test_what_goes_on_from_half_a_character_is_whole():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("aé", add_special_tokens=False).input_ids
    assert decoded(tokenizer, [], ids) == "aé"
    assert decoded(tokenizer, ids, tokenizer(" b", add_special_tokens=False).input_ids) == " b"


# --- What a model cannot ----------------------------------------------------------------------


def test_the_head_reads_states_in_one_piece():
    """Of a slice torch would copy frozen bfloat16 weights for each row."""
    model, seen = tiny_model().requires_grad_(False), []
    engines = [TransformersEngine(model, tiny_tokenizer(), "alpaca") for _ in range(2)]
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, __: seen.append(args[0].is_contiguous()))
    assert (
        len([reply for batch in engines[1].generate(requests_for(PROMPTS), Sampling(3), "x") for reply in batch]) == 3
    )
    assert len(seen) > 3
    assert all(seen)
    assert len(head._forward_pre_hooks) == 1


def test_a_prompt_beyond_what_the_model_reads_is_named_with_its_numbers():
    model = made_tiny("gpt2", max_position_embeddings=40, n_positions=40)
    engine = TransformersEngine(model, tiny_tokenizer(), "chat")
    assert len(told(engine, Sampling(4))) == 3
    with pytest.raises(UserError, match=r"s: 1 of 3 prompts with a reply of up to 26 tokens .* the 40 .* has 16"):
        told(engine, Sampling(26))


def test_a_question_beyond_what_the_model_reads_is_told_and_not_asked(capsys):
    engine = TransformersEngine(made_tiny("gpt2", max_position_embeddings=40, n_positions=40), tiny_tokenizer(), "chat")
    short, long = engine.complete(["Why?", "Why?" * 20], Sampling(4))
    assert short
    assert long == ""
    assert "1 of 2 texts with 4 tokens to come are more than the 40 tokens" in capsys.readouterr().err


def test_a_token_beyond_the_embeddings_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im|>"]})
    tokenizer.chat_template = "<|im|>" + tokenizer.chat_template
    with pytest.raises(UserError, match=r"writes the token \d+ \('<\|im\|>'\), and the model knows"):
        told(TransformersEngine(tiny_model(), tokenizer, "chat"), Sampling(4))


def test_a_padding_token_that_the_model_does_not_know_is_replaced_by_the_end_token():
    padded = tiny_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    assert padded.pad_token_id == tiny_model().get_input_embeddings().num_embeddings
    found, wanted = (
        told(TransformersEngine(speaking(), each, "chat"), Sampling(6)) for each in (padded, tiny_tokenizer())
    )
    assert found == wanted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_told(temperature):
    """All weights are finite: what they make is not."""
    model = tiny_model(tied=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(3e38)
    engine = TransformersEngine(model, tiny_tokenizer(), "chat")
    with pytest.raises(UserError, match="logits are not finite numbers, though its weights are"):
        told(engine, Sampling(4, temperature))
    with pytest.raises(UserError, match="logits are not finite numbers"):
        list(engine.stream("Why?", Sampling(4, temperature)))
    with pytest.raises(UserError, match="logits are not finite numbers"):
        engine.mean_losses([Reply("a", "s", "?", "Sure", "stop", 0, 0)])


def test_a_model_that_makes_logits_of_all_positions_all_the_same_has_the_same_losses(monkeypatch):
    """As xLSTM, which passes over `logits_to_keep`."""
    engine = TransformersEngine(speaking(), tiny_tokenizer(), "chat")
    replies = [Reply(f"r{index}", "s", "Why?" * index, "Blue" * (3 - index), "stop", 0, 0) for index in (1, 2)]
    wanted = engine.mean_losses(replies)
    forward = engine.model.forward
    monkeypatch.setattr(engine.model, "forward", lambda logits_to_keep=0, **inputs: forward(**inputs))
    assert engine.mean_losses(replies) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("name", "reads"), [("llama", 256), ("roberta", 255), ("camembert", 255), ("xlnet", None)])
def test_how_much_a_model_reads_is_what_it_can_read(name, reads):
    """RoBERTa's kin count positions from behind the padding's; XLNet's settings say -1 for no limit."""
    model = made_tiny(name)
    assert context_of(model) == reads
    if name != "llama":
        ids = torch.full((1, reads or 300), 9)
        assert model(input_ids=ids, use_cache=False).logits.shape[1] == ids.shape[1]


@pytest.mark.parametrize(("name", "together"), [("llama", True), ("rwkv", False), ("minimax", False)])
def test_a_model_that_batches_change_is_asked_one_at_a_time(capsys, name, together):
    """RWKV reads the padding, and of MiniMax no row can leave a batch."""
    model = made_tiny(name)
    model.generation_config.eos_token_id = list(range(0, 300, 9))
    tokenizer = tiny_tokenizer()
    batched = TransformersEngine(model, tokenizer, "chat")
    found = told(batched, Sampling(8))
    assert ("it is asked one at a time" in capsys.readouterr().err) != together
    assert batched._answers_together == together
    alone = told(TransformersEngine(model, tokenizer, "chat", batch_size=1), Sampling(8))
    assert {name: reply.completion for name, reply in found.items()} == {
        name: reply.completion for name, reply in alone.items()
    }


@pytest.mark.parametrize(("opening", "closing"), THOUGHTS)
def test_a_thought_in_what_a_server_says_is_told_from_its_answer(opening, closing):
    assert answer_in(f"{opening}It asks.{closing}\n\nBlue.") == ("Blue.", f"{opening}It asks.{closing}")
    # The template opened it in the prompt.
    assert answer_in(f"It asks.{closing} Blue.") == ("Blue.", f"It asks.{closing}")
    assert answer_in(f" {opening}It asks, and then") == ("", f" {opening}It asks, and then")
    assert answer_in(" Blue. ") == ("Blue.", "")


@pytest.mark.parametrize("size", [7, 3000, 20000])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_a_nucleus_is_the_one_that_transformers_sorts_for(size, top_p):
    torch.manual_seed(size)
    draws = 300 if size < 10_000 else 60
    # Rows of which one token is nearly certain, and rows of which all are as likely.
    scores = torch.randn(4, size) * torch.tensor([20.0, 3.0, 1.0, 0.01])[:, None]
    wanted = TopPLogitsWarper(top_p)(None, scores).softmax(-1)
    found = torch.stack([from_nucleus(scores, top_p) for _ in range(draws)])
    assert wanted.gather(1, found.T).min() > 0
    # What is drawn is drawn as often as it is likely: of the likeliest token, within five deviations.
    most, token = wanted.max(-1)
    share = (found == token).float().mean(0)
    assert ((share - most).abs() <= 5 * (most * (1 - most) / draws).sqrt() + 1.5 / draws).all()


def test_a_whole_distribution_is_a_nucleus_too_and_a_generator_repeats_it():
    scores = torch.randn(3, 50)
    one, other = (from_nucleus(scores, 1.0, torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.equal(other)
    assert one.shape == (3,)


def test_a_cache_with_room_holds_what_transformers_own_does_and_moves_nothing():
    torch.manual_seed(0)
    ours, theirs = RoomyLayer(), DynamicLayer()

    def both(width, rows=1):
        new = torch.randn(2, rows, 2, width, 4)
        for layer in (ours, theirs):
            shown = layer.update(*new)
            assert shown[0] is layer.keys
            assert shown[1] is layer.values
        return ours.keys.data_ptr()

    def same():
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=0)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=0)
        assert ours.get_seq_length() == theirs.get_seq_length()

    places = [both(5)] + [both(1) for _ in range(ROOM)]
    assert len(set(places)) == 1
    assert both(1) != places[0]  # The room is used up.
    same()
    for layer in (ours, theirs):
        layer.batch_repeat_interleave(3)
    both(2, rows=3)
    same()
    for layer in (ours, theirs):
        layer.reorder_cache(torch.tensor([2, 0]))
    both(1, rows=2)
    same()
    for layer in (ours, theirs):
        layer.batch_select_indices(slice(0, 1))  # A view: what it left out is still behind it.
    both(1, rows=1)
    same()
    for layer in (ours, theirs):
        layer.crop(-4)
    both(1, rows=1)
    same()
    for layer in (ours, theirs):
        layer.reset()
    both(3)
    same()


def test_only_layers_that_grow_with_every_token_get_room():
    config = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    cache = DynamicCache(config=config)
    make_room(cache)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, RoomyLayer]
    make_room(None)
