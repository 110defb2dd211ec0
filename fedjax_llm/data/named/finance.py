"""Sentiment, questions and instructions about finance."""

from collections.abc import Mapping

from fedjax_llm.data.named.general import OPENFEDLLM, READ
from fedjax_llm.data.named.spec import Named

_BENCHMARKS = (
  'https://github.com/rui-ye/OpenFedLLM/blob/'
  'fee25e06b9d4398dbbba0f8a1dd2585f4697f065/evaluation/financial/benchmarks/'
)
_PHRASEBANK = (
  'https://github.com/huggingface/datasets/blob/'
  '040102f100964a33fd334e2695f1c493fa6b92db/datasets/financial_phrasebank/'
  'README.md'
)
_SENTIMENT = ('negative', 'neutral', 'positive')


def _phrasebank(agreement: str, subset: str, size: int) -> Named:
  return Named(
    f'Sentiment of sentences of financial news, {agreement} agreement',
    'takala/financial_phrasebank',
    'cc-by-nc-sa-3.0',
    _PHRASEBANK,
    READ,
    text='{sentence}',
    label='label',
    classes=_SENTIMENT,
    subset=subset,
    sizes={'train': size},
  )


SETS: Mapping[str, Named] = {
  'fingpt_sentiment': Named(
    'Sentiment of financial news and tweets, as instructions',
    'FinGPT/fingpt-sentiment-train',
    None,
    OPENFEDLLM,
    READ,
    prompt='{instruction}\n\n{input}',
    response='{output}',
    label='output',
  ),
  'finance_alpaca': Named(
    'Questions about finance, after Alpaca',
    'gbharti/finance-alpaca',
    None,
    OPENFEDLLM,
    READ,
    prompt='{instruction}\n\n{input}',
    response='{output}',
  ),
  'financial_phrasebank': _phrasebank(
    'at least 50 %', 'sentences_50agree', 4846
  ),
  'financial_phrasebank_66': _phrasebank(
    'at least 66 %', 'sentences_66agree', 4217
  ),
  'financial_phrasebank_75': _phrasebank(
    'at least 75 %', 'sentences_75agree', 3453
  ),
  'financial_phrasebank_all': _phrasebank('full', 'sentences_allagree', 2264),
  'twitter_financial_sentiment': Named(
    'Sentiment of tweets about finance',
    'zeroshot/twitter-financial-news-sentiment',
    'mit',  # from the table of cards in github.com/sileod/tasksource 0.1.1
    _BENCHMARKS + 'tfns.py',
    READ,
    text='{text}',
    label='label',
    classes=('negative', 'positive', 'neutral'),
  ),
  'news_with_gpt_instructions': Named(
    'Seven grades of sentiment of financial news',
    'oliverwang15/news_with_gpt_instructions',
    None,
    _BENCHMARKS + 'nwgi.py',
    READ,
    text='{news}',
    label='label',
  ),
  'finance_instruct_500k': Named(
    'Instructions about finance from many sources',
    'Josephgflowers/Finance-Instruct-500k',
    None,
    'https://github.com/syang-genai/Qwen-Finance-LLM/blob/main/Qwen-SFT/'
    'preprocess/JFFinanceInstruct.py',
    READ,
    prompt='{system}\n\n{user}',
    response='{assistant}',
  ),
}
