"""ActivityNet-QA: short open questions about videos of activities.

Data: Video-LLaVA's ``GPT_Zero_Shot_QA/Activitynet_Zero_Shot_QA`` with ``test_q.json``, ``test_a.json`` (the test set as
ActivityNet-QA has it: 8,000 questions, ten about each of 800 videos) and ``all_test/``, where a video's file has
``v_`` before its name. On the hub lmms-lab/ActivityNetQA has the same questions (types as text) and the videos in
archives ``videos_chunked_*.zip``, some 140 GB, that are read as they are; a local copy may have them unpacked.
lmms-eval asks with "?" and a short-answer instruction; here both ways ask as Video-LLaVA does. Prompt, judge and score:
``eval/video_qa.py``. Names of the types: ActivityNet-QA's ``evaluation/eval.py``.
"""

from ..video_qa import video_qa

_TYPES = (
    "motion",
    "spatial relation",
    "temporal relation",
    "yes/no",
    "color",
    "object",
    "location",
    "number",
    "other",
)

BENCHMARK = video_qa(
    name="activitynet",
    title="ActivityNet-QA",
    size="8,000 questions",
    folder="Activitynet_Zero_Shot_QA",
    videos="all_test",
    source=(
        "Activitynet_Zero_Shot_QA, linked from "
        "https://github.com/PKU-YuanGroup/Video-LLaVA/blob/main/TRAIN_AND_VALIDATE.md (Baidu: "
        "https://pan.baidu.com/s/1d_AVx9Mz_57nA3exhQZGyA?pwd=9amr): unpack it here; the two json files are also in "
        "https://github.com/MILVLG/activitynet-qa/tree/master/dataset"
    ),
    hub="lmms-lab/ActivityNetQA",
    prefix="v_",
    kinds={str(number): name for number, name in enumerate(_TYPES)},
)
