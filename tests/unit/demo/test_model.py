"""The demo's tokenizer and model."""


def test_words_and_digits_stay_single_letters(tokenizer):
    tokens = tokenizer.tokenize('Reverse the word "STONE".')
    assert [token for token in tokens if token.isupper() and len(token) == 1] == list("STONE")
    assert tokenizer.tokenize("4096") == list("4096")


def test_the_tokenizer_loses_nothing(tokenizer):
    text = 'Sort: 3 1 2. "ÄΩ 🦀"\n'
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_chat_template_continues_its_prompt(tokenizer, rows):
    row = rows[0]
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    assert prompt.startswith("<s>[INST]")
    assert prompt.endswith("[/INST]")
    assert whole == prompt + row["chosen"][0]["content"] + "</s>"


def test_the_model_has_mistrals_proportions(model, tokenizer):
    config = model.config
    assert config.model_type == "mistral"
    assert config.vocab_size == len(tokenizer)
    assert config.intermediate_size / config.hidden_size == 14336 / 4096
    assert config.num_attention_heads // config.num_key_value_heads == 32 // 8
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
