"""MSVD-QA: short open questions about clips from YouTube.

Data: Video-LLaVA's ``GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA`` with ``test_q.json``, ``test_a.json`` and ``videos/``; 13,157
questions. There is no data set of lmms-lab. From a folder of parquet files (``data/test-*.parquet``) the columns are
those of IG-VLM's ``MSVD_QA.csv``: video_name, question, answer, question_id, question_type; that file has the 6,415
questions of the validation set, ending in "?". The videos lie beside under video_name, or in a column ``video``.
Prompt, judge and score: ``eval/video_qa.py``.
"""

from ..video_qa import video_qa

BENCHMARK = video_qa(
    name="msvd",
    title="MSVD-QA",
    size="13,157 questions",
    folder="MSVD_Zero_Shot_QA",
    videos="videos",
    source=(
        "MSVD_Zero_Shot_QA, linked from https://github.com/PKU-YuanGroup/Video-LLaVA/blob/main/TRAIN_AND_VALIDATE.md "
        "(Google Drive: https://drive.google.com/file/d/1_q4eiSdb7i8P3Hmh4lCfgY1uBGyzU_7X/view): unpack it here"
    ),
)
