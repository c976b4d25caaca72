"""MSRVTT-QA: short open questions about clips of many kinds.

Data: Video-LLaVA's ``GPT_Zero_Shot_QA/MSRVTT_Zero_Shot_QA`` with ``test_q.json``, ``test_a.json`` and ``videos/all/``;
the test set has 72,821 questions. There is no data set of lmms-lab. From a folder of parquet files
(``data/test-*.parquet``) the columns are those of IG-VLM's ``MSRVTT_QA.csv``: video_name, question, answer,
question_id, question_type; that file has the 12,278 questions of the validation set, ending in "?". The videos lie
beside under video_name, or in a column ``video``. Prompt, judge and score: ``eval/video_qa.py``.
"""

from ..video_qa import video_qa

BENCHMARK = video_qa(
    name="msrvtt",
    title="MSRVTT-QA",
    size="72,821 questions",
    folder="MSRVTT_Zero_Shot_QA",
    videos="videos/all",
    source=(
        "MSRVTT_Zero_Shot_QA, linked from https://github.com/PKU-YuanGroup/Video-LLaVA/blob/main/TRAIN_AND_VALIDATE.md "
        "(Google Drive: https://drive.google.com/file/d/1yXh9lz7flQ5Ui2IRSd6Qi6RqSEeUJwl3/view): unpack it here"
    ),
)
