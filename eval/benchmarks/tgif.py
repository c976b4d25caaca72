"""TGIF-QA: short open questions about animated GIFs.

Data: Video-LLaVA's ``GPT_Zero_Shot_QA/TGIF_Zero_Shot_QA`` with ``test_q.json``, ``test_a.json`` and ``mp4/``. Public
code that checks this folder expects 25,751 questions (not looked at here), as many as TGIF-QA's four test sets have
together; Video-ChatGPT's authors used one of them, FrameQA, with 13,691 about 7,132 GIFs. There is no data set of
lmms-lab. From a folder of parquet files (``data/test-*.parquet``) the columns are those of IG-VLM's
``TGIF_FrameQA.csv``: video_id, video_name, question, answer, question_type; the id is video_id (FRAMEQA1159),
because the column question_id there is shared by the questions about one GIF. IG-VLM's questions end in "?". The videos
lie beside under video_name, or in a column ``video``. Prompt, judge and score: ``eval/video_qa.py``.
"""

from ..video_qa import video_qa

BENCHMARK = video_qa(
    name="tgif",
    title="TGIF-QA",
    size="25,751 questions, of which FrameQA 13,691",
    folder="TGIF_Zero_Shot_QA",
    videos="mp4",
    source=(
        "TGIF_Zero_Shot_QA, linked from https://github.com/PKU-YuanGroup/Video-LLaVA/blob/main/TRAIN_AND_VALIDATE.md "
        "(Google Drive: https://drive.google.com/file/d/1so6L9rg_gdC8Segur7rKML-ffd4Ix_I6/view): unpack it here"
    ),
    id_column="video_id",
)
