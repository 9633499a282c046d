"""Writes the data of the recipes' toy profiles: real data brought into one form, or the generated corpus in the same form.

    toy_data.py real FOLDER OUTPUT        toy_data.py generated CORPUS OUTPUT

FOLDER holds the real data:
    instruct/*.jsonl.gz                 records: inputs, targets, task_name, task_source, template_type (flan2021, t0, niv2, cot)
    tokenizers/, eval/, finetune/       or the archives tokenizers.tar.gz, eval_public.tar.gz, finetune.tar.gz with these folders

OUTPUT, the same from both:
    tokenizer/tokenizer.json
    flan/*.jsonl.gz                     instruction records; in more.jsonl.gz those of one template for each of two tasks
    mmlu/*.csv                          question, A, B, C, D, answer; no header
    mmlu_pro.jsonl                      question, options (five), answer (A to E)
    raft/{ade,nis,ose}.csv              with RAFT's columns and labels
    zero/*.jsonl                        validation sets with the columns of their Hugging Face versions
    finetune/SET/{train,test}.jsonl     inputs (the text), targets (a letter)

Real sets that are missing are stood in for by the nearest ones that are there, and generated tasks bear the name of a FLAN task of
the same kind, so that one toy profile fits both. Every such choice stands in this file.
"""

import contextlib
import csv
import gzip
import io
import json
import pathlib
import re
import shutil
import sys
import tarfile

ARCHIVES = {"tokenizers": "tokenizers.tar.gz", "eval": "eval_public.tar.gz", "finetune": "finetune.tar.gz"}
LETTERS = "ABCDEFGHIJ"
# Every n-th row of a set that has no test rows of its own becomes one.
TEST_EVERY = 5


def main():
    if len(sys.argv) != 4 or sys.argv[1] not in ("real", "generated"):
        sys.exit(__doc__)
    source, output = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    output.mkdir(parents=True)
    try:
        (real if sys.argv[1] == "real" else generated)(source, output)
        more_instructions(output)
    except FileNotFoundError as error:
        sys.exit(f"error: no {error.filename}\n\n  hint: the layout of the folder stands at the top of scripts/toy_data.py")


# Real data


def real(folder, output):
    unpacked = unpack(folder, output / ".unpacked")
    (output / "flan").mkdir()
    for file in sorted((folder / "instruct").glob("*.jsonl.gz")) or missing(folder / "instruct" / "*.jsonl.gz"):
        shutil.copyfile(file, output / "flan" / file.name)
    # The small vocabulary: a model of a minute has to learn an embedding for every word.
    copy(unpacked("tokenizers") / "bert-base-uncased" / "tokenizer.json", output / "tokenizer" / "tokenizer.json")
    evaluation = unpacked("eval")
    for file in sorted((evaluation / "mmlu" / "val").glob("*.csv")) or missing(evaluation / "mmlu" / "val" / "*.csv"):
        copy(file, output / "mmlu" / file.name)
    questions = rows(evaluation / "hf_arrow" / "tau__commonsense_qa__validation.jsonl")
    write_rows(output / "mmlu_pro.jsonl", [pro(row["question"], row["choices"]["text"], row["answerKey"]) for row in questions])
    for name, raft in [("ade", "ade_corpus_v2"), ("nis", "neurips_impact_statement_risks"), ("ose", "one_stop_english")]:
        copy(evaluation / "raft" / raft / "train.csv", output / "raft" / f"{name}.csv")
    for name, file in REAL_ZERO.items():
        found = rows(evaluation / "hf_arrow" / f"{file}__validation.jsonl")
        write_rows(output / "zero" / f"{name}.jsonl", [row for row in found if "answerKey" not in row or with_letter(row)])
    stand_in_for_the_rest(output / "zero")
    real_finetune(evaluation, unpacked("finetune"), output)
    shutil.rmtree(output / ".unpacked", ignore_errors=True)


def with_letter(row):
    """Whether a question has four options; its answer becomes a letter, where some of ARC have a number."""
    row["answerKey"] = {"1": "A", "2": "B", "3": "C", "4": "D"}.get(row["answerKey"], row["answerKey"])
    return len(row["choices"]["text"]) == 4


REAL_ZERO = {
    "rte": "glue__rte",
    "cb": "super_glue__cb",
    "copa": "super_glue__copa",
    "piqa": "piqa__plain_text",
    "arc_easy": "ai2_arc__ARC-Easy",
    "arc_challenge": "ai2_arc__ARC-Challenge",
    "openbookqa": "openbookqa__main",
    "boolq": "boolq",
    "winogrande": "winogrande__winogrande_xl",
    "mrpc": "glue__mrpc",
    "sst2": "glue__sst2",
}


def stand_in_for_the_rest(zero):
    """Sets that FLAN scores and that are not among the real ones: the nearest one of the same cluster, in their columns."""
    put = lambda name, found: write_rows(zero / f"{name}.jsonl", found)
    three = {0: 0, 1: 2, 2: 1}
    for part in "123":
        put(f"anli_r{part}", [{"premise": row["premise"], "hypothesis": row["hypothesis"], "label": three[row["label"]]}
                              for row in rows(zero / "cb.jsonl")])
    put("hellaswag", [{"ctx": row["question_stem"], "endings": row["choices"]["text"], "label": str("ABCD".index(row["answerKey"]))}
                      for row in rows(zero / "openbookqa.jsonl")])
    put("story_cloze", [story(row["premise"], [row["choice1"], row["choice2"]], row["label"]) for row in rows(zero / "copa.jsonl")])
    put("definite_pronoun_resolution", [{"sentence": row["sentence"], "pronoun": "_", "candidates": [row["option1"], row["option2"]],
                                         "label": int(row["answer"]) - 1} for row in rows(zero / "winogrande.jsonl")])
    put("imdb", [{"text": row["sentence"], "label": row["label"]} for row in rows(zero / "sst2.jsonl")])


def story(beginning, endings, right):
    """A story of one sentence, in StoryCloze's columns."""
    sentences = {f"input_sentence_{n}": beginning if n == 1 else "" for n in range(1, 5)}
    return {**sentences, "sentence_quiz1": endings[0], "sentence_quiz2": endings[1], "answer_right_ending": right + 1}


def real_finetune(evaluation, finetune, output):
    def put(name, train, test):
        write_rows(output / "finetune" / name / "train.jsonl", train)
        write_rows(output / "finetune" / name / "test.jsonl", test)

    # MNLI: the English development set of XNLI, which was written in the same way.
    lines = [line.split("\t") for line in text(evaluation / "xnli" / "dev-en.tsv") if line.count("\t") == 2]
    letters = {"entailment": "A", "neutral": "B", "contradiction": "C"}
    put("mnli", *split([pair(f"Premise: {p}\nHypothesis: {h}", letters[label.strip()]) for p, h, label in lines]))
    # Yahoo and 20 newsgroups: TREC, six kinds of questions, the one set of topics with a test set.
    kinds = {"ABBR": "A", "DESC": "B", "ENTY": "C", "HUM": "D", "LOC": "E", "NUM": "F"}
    trec = [[pair(line.split(" ", 1)[1], kinds[line.split(":")[0]]) for line in text(file)]
            for file in (finetune / "trec" / "TREC.train", evaluation / "trec" / "TREC.test")]
    put("yahoo", *trec)
    put("20ng", *trec)
    # AG News and IMDB: the rows of FLAN, as they are.
    flan = [json.loads(line) for line in gzip.open(output / "flan" / "flan2021.jsonl.gz", "rt", encoding="utf-8")]
    put("agnews", *split(flan_rows(flan, "ag_news_subset", ["World", "Sports", "Business", "Sci/Tech"])))
    put("imdb", *split(flan_rows(flan, "imdb_reviews", ["negative", "positive"])))
    lines = [line.split("\t") for line in text(finetune / "sst2" / "train.tsv")[1:]]
    put("sst2", [pair(sentence, LETTERS[int(label)]) for sentence, label in lines],
        [pair(row["sentence"], LETTERS[row["label"]]) for row in rows(output / "zero" / "sst2.jsonl")])
    put("sst5", *[[pair(line[2:], LETTERS[int(line[0])]) for line in text(file)]
                  for file in (finetune / "sst5" / "stsa.fine.train", evaluation / "sst5" / "stsa.fine.dev")])


def flan_rows(flan, task, answers):
    """The zero-shot rows of a task, its answers as letters."""
    return [pair(row["inputs"], LETTERS[answers.index(row["targets"])]) for row in flan
            if row["task_name"].startswith(task) and row["template_type"].startswith("zs") and row["targets"] in answers]


def unpack(folder, into):
    def unpacked(name):
        if (folder / name).is_dir():
            return folder / name
        if not (into / name).is_dir():
            with tarfile.open(folder / ARCHIVES[name]) as archive:
                if hasattr(tarfile, "data_filter"):
                    archive.extraction_filter = tarfile.data_filter
                archive.extractall(into)
        return into / name

    return unpacked


# Generated data

# Before the name of a generated task: the FLAN task of the same kind that it stands for.
STANDS_FOR = {
    "sentiment_film": "imdb_reviews",
    "sentiment_restaurant": "yelp_polarity_reviews",
    "sentiment_phone": "sentiment140",
    "sentiment_hotel": "sst2",
    "entailment_place": "rte",
    "entailment_ownership": "cb",
    "entailment_activity": "mnli_matched",
    "arithmetic_addition": "math_dataset",
    "arithmetic_subtraction": "math_dataset",
    "arithmetic_next": "trivia_qa",
    "arithmetic_previous": "natural_questions",
    "arithmetic_word": "natural_questions",
    "lookup_two_objects": "bool_q",
    "lookup_three_objects": "multirc",
    "lookup_clothing": "drop",
    "lookup_vehicles": "squad_v1",
    "choice_animal": "arc_easy",
    "choice_fruit": "arc_challenge",
    "choice_tool": "piqa",
    "choice_vehicle": "copa",
    "choice_clothing": "hellaswag",
    "odd_one_out": "story_cloze",
    "category_word": "ag_news_subset",
    "category_sentence": "trec",
    "membership_animal": "coqa",
    "membership_fruit": "quac",
    "membership_furniture": "openbookqa",
    "comparison_larger": "winogrande",
    "comparison_smaller": "definite_pronoun_resolution",
    "threshold_five": "cola",
    "parity": "wic",
    "opposite_word": "gigaword",
    "opposite_sentence": "samsum",
    "same_or_different": "glue_qqp",
    "letter_order": "wsc",
}
KINDS = ["animal", "fruit", "tool", "vehicle", "clothing", "furniture"]


def generated(corpus, output):
    copy(corpus / "tokenizer.json", output / "tokenizer" / "tokenizer.json")
    train = []
    (output / "flan").mkdir()
    for file in sorted((corpus / "train").glob("*.jsonl.gz")) or missing(corpus / "train" / "*.jsonl.gz"):
        part = [json.loads(line) for line in gzip.open(file, "rt", encoding="utf-8")]
        train += part
        with compressed(output / "flan" / file.name) as out:
            out.writelines(json.dumps({**row, "task_name": f"{STANDS_FOR[row['task_name']]}-{row['task_name']}"}) + "\n" for row in part)
    choices = [choice(row) for row in rows(corpus / "eval" / "choice.jsonl")]
    path = output / "mmlu" / "choice.csv"
    path.parent.mkdir()
    with path.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([question, *options, answer] for question, options, answer in choices)
    write_rows(output / "mmlu_pro.jsonl", [pro(question, [*options, "none"], answer) for question, options, answer in choices])
    generated_raft(corpus, output)
    generated_zero(corpus, choices, train, output)
    generated_finetune(train, output)


def choice(row):
    """A question with four options, taken apart."""
    lines = row["inputs"].split("\n")
    options = [line[3:] for line in lines if re.match("[A-D]: ", line)]
    question = " ".join(line for line in lines if not re.match("[A-D]: ", line))
    return question, options, row["targets"]


def generated_raft(corpus, output):
    sentiment, entailment = rows(corpus / "eval" / "sentiment.jsonl"), rows(corpus / "eval" / "entailment.jsonl")
    ade = {"negative": "ADE-related", "positive": "not ADE-related"}
    nis = {"negative": "mentions a harmful application", "positive": "doesn't mention a harmful application"}
    ose = {"yes": "elementary", "maybe": "intermediate", "no": "advanced"}
    tables = {
        "ade": (["Sentence", "Label"], [[row["inputs"], ade[row["targets"]]] for row in sentiment]),
        "nis": (["Paper title", "Impact statement", "Label"], [["none", row["inputs"], nis[row["targets"]]] for row in sentiment]),
        "ose": (["Article", "Label"], [[row["inputs"], ose[row["targets"]]] for row in entailment]),
    }
    (output / "raft").mkdir()
    for name, (header, table) in tables.items():
        with (output / "raft" / f"{name}.csv").open("w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([header, *table])


def generated_zero(corpus, choices, train, output):
    def put(name, found):
        write_rows(output / "zero" / f"{name}.jsonl", found)

    held_out = [row for row in train if "held_out" in row["template_type"]]
    of = lambda family: [row for row in held_out if row["task_name"].startswith(family)]
    number = {"yes": 0, "no": 1, "maybe": 2}
    pairs = []
    for row in rows(corpus / "eval" / "entailment.jsonl"):
        premise, question = row["inputs"].split("\n")
        hypothesis = question.removeprefix("Does it follow that ").split("?")[0]
        pairs.append((premise, hypothesis, number[row["targets"]]))
    put("rte", [{"sentence1": p, "sentence2": h, "label": label} for p, h, label in pairs if label < 2])
    put("cb", [{"premise": p, "hypothesis": h, "label": label} for p, h, label in pairs])
    put("mrpc", [{"sentence1": first, "sentence2": second, "label": int(row["targets"] == "same")} for row in of("same_or_different")
                 for first, second in [re.match("Are the words (.*) and (.*) the same", row["inputs"]).groups()]])
    two = []
    for row in of("comparison"):
        question, first, second = re.match("(Which is the .* number), (.*) or (.*)\\?", row["inputs"]).groups()
        two.append((question, [first, second], int(row["targets"] == second)))
    put("copa", [{"premise": q, "choice1": o[0], "choice2": o[1], "question": "effect", "label": label} for q, o, label in two])
    put("piqa", [{"goal": q, "sol1": o[0], "sol2": o[1], "label": label} for q, o, label in two])
    put("winogrande", [{"sentence": q, "option1": o[0], "option2": o[1], "answer": str(label + 1)} for q, o, label in two])
    for name, key in [("arc_easy", "question"), ("arc_challenge", "question"), ("openbookqa", "question_stem")]:
        put(name, [{key: question, "choices": {"text": options, "label": list("ABCD")}, "answerKey": answer}
                   for question, options, answer in choices])
    put("boolq", [{"question": row["inputs"], "passage": "none", "answer": row["targets"] == "yes"} for row in of("membership")])
    put("sst2", [{"sentence": row["inputs"], "label": int(row["targets"] == "positive")} for row in rows(corpus / "eval" / "sentiment.jsonl")])
    stand_in_for_the_rest(output / "zero")


def generated_finetune(train, output):
    def put(name, family, answers):
        found = [row for row in train if row["task_name"].startswith(family) and row["targets"] in answers]
        for part, wanted in [("train", False), ("test", True)]:
            chosen = [row for row in found if ("held_out" in row["template_type"]) == wanted]
            write_rows(output / "finetune" / name / f"{part}.jsonl",
                       [pair(row["inputs"], LETTERS[answers.index(row["targets"])]) for row in chosen])

    put("mnli", "entailment", ["yes", "maybe", "no"])
    put("yahoo", "category", KINDS)
    put("20ng", "category", KINDS)
    put("agnews", "category", KINDS[:4])
    put("sst2", "sentiment", ["negative", "positive"])
    put("imdb", "sentiment", ["negative", "positive"])
    put("sst5", "category", KINDS[:5])


# Both


# What a small model learns in a minute: one template, many rows.
MORE_ROWS = 12_000
MORE = {
    "sst2": ("sst2", "{}\nIs this review positive or negative?", ["negative", "positive"]),
    "yahoo": ("trec", "{}\nWhich kind is it, A to F?", list("ABCDEF")),
}


def more_instructions(output):
    """Fine-tuning rows as instructions: FLAN's own are too few and too many-sided for a model that starts from scratch."""
    with compressed(output / "flan" / "more.jsonl.gz") as out:
        for name, (task, template, words) in MORE.items():
            for row in rows(output / "finetune" / name / "train.jsonl")[:MORE_ROWS]:
                record = {"inputs": template.format(row["inputs"].strip()), "targets": words[LETTERS.index(row["targets"])],
                          "task_source": "Toy", "task_name": f"{task}_more", "template_type": "zs_more"}
                out.write(json.dumps(record) + "\n")


@contextlib.contextmanager
def compressed(path):
    """A text file whose bytes do not tell when it was written: samples are drawn by the hash of their file."""
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as packed:
        with io.TextIOWrapper(packed, encoding="utf-8") as out:
            yield out


def pair(inputs, targets):
    return {"inputs": inputs, "targets": targets}


def pro(question, options, answer):
    return {"question": question, "options": options, "answer": answer}


def split(found):
    """Rows to train on, and every n-th to test."""
    return [row for i, row in enumerate(found) if i % TEST_EVERY], found[::TEST_EVERY]


def rows(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def text(path):
    """Lines of a text whose encoding is not always what it should be."""
    return path.read_bytes().decode("utf-8", errors="replace").splitlines()


def write_rows(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)


def copy(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def missing(pattern):
    raise FileNotFoundError(2, "no such file", str(pattern))


main()
