"""The machinery that runs tutorial pages: a page that shows what happens passes, one with any other line fails."""

import sys

import pytest
from tutorial_pages import PageDiffersError, compare, lines_shown, run_page

PAGE = """# A page
```console
$ git clone https://example.com/hgkd
Cloning into 'hgkd'...
$ hgkd make-shapes data/shapes --plain \\
    --train 8 --test 8
16 images in data/shapes (imagefolder)
$ ls data/shapes
test
train
```
A file, and what it prints:

```python
# mine/parts_of_a_page.py
VALUE = 3
```

```python
import os
import sys

sys.path.insert(0, os.path.abspath("mine"))
from parts_of_a_page import VALUE

print("the value is", VALUE)
for number in range(VALUE):
    print("epoch", number, "loss", 0.5 ** number)
print("saved /home/me/work/model.pth")
```

```text
the value is 3
epoch 0 loss 1.0
epoch 1 loss 0.5
...
saved /home/me/work/model.pth
```

```text
data/shapes
├── test
│   ├── ...
│   └── triangle
└── train      the images to learn from
    ├── disc
    │   └── ...
    └── ...
```
"""


def write(folder, text):
    page = folder / "page.md"
    page.write_text(text)
    return page


@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the page adds to it
    monkeypatch.delitem(sys.modules, "parts_of_a_page", raising=False)
    return tmp_path


def test_a_page_that_shows_what_happens(there):
    names = run_page(write(there, PAGE))
    assert names["VALUE"] == 3
    assert (there / "mine/parts_of_a_page.py").read_text() == "# mine/parts_of_a_page.py\nVALUE = 3\n"


def test_what_may_differ(there):
    """Numbers, how often a line is repeated, where the work folder is."""
    text = (
        PAGE.replace("loss 1.0", "loss 9.5e-3")
        .replace("16 images", "1600 images")
        .replace("/home/me/work/", "~/somewhere/else/")
    )
    run_page(write(there, text))


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("16 images in data/shapes (imagefolder)", "16 pictures in data/shapes (imagefolder)"),
        ("16 images in data/shapes (imagefolder)", ""),
        ("16 images in data/shapes (imagefolder)", "16 images in data/shapes (imagefolder)\nand a line more"),
        ("train\n```\nA file", "training\n```\nA file"),
        ("test\ntrain\n```", "train\ntest\n```"),
        ("epoch 0 loss 1.0", "epoch 0 accuracy 1.0"),
        ("the value is 3\n", ""),
        ("...\nsaved /home/me/work/model.pth", ""),
        ("...\nsaved /home/me/work/model.pth", "...\nsaved /home/me/work/student.pth"),
        ("├── test\n│", "├── val\n│"),
        ("│   └── triangle", "│   └── cube"),
        ("    └── ...\n", ""),
        ("data/shapes\n├", "data/forms\n├"),
        ("    --train 8 --test 8", "    --train 8 --tests 8"),
        ("VALUE = 3", "VALUE = 3 +"),
    ],
)
def test_a_page_that_shows_anything_else_fails(line, other, there):
    assert PAGE.count(line) == 1
    with pytest.raises(PageDiffersError):
        run_page(write(there, PAGE.replace(line, other)))


def test_every_shown_line_of_a_console_block_counts(there):
    for number in lines_shown(PAGE):
        lines = PAGE.splitlines()
        lines[number] = "this is not printed"
        with pytest.raises(PageDiffersError, match="not printed: 'this is not printed'"):
            run_page(write(there, "\n".join(lines) + "\n"))
        (there / "data").rename(there / f"data{number}")
    assert len(lines_shown(PAGE)) == 3


def test_commands_that_fail(there):
    with pytest.raises(PageDiffersError, match=r"line 2: hgkd make-shapes a b: SystemExit"):
        run_page(write(there, "```console\n$ hgkd make-shapes a b\n```\n"))
    with pytest.raises(PageDiffersError, match="exit code 2"):
        run_page(write(there, "```console\n$ ls nowhere\n```\n"))
    with pytest.raises(PageDiffersError, match="begins with a command"):
        run_page(write(there, "```console\nls\n```\n"))


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("a\n...\nb", "a\nb"),
        ("a\n...\nb", "a\nx\nb\ny\nb"),
        ("...\nb", "x\nb"),
        ("b\n...", "b\nx"),
        ("...", ""),
        ("", ""),
        ("...\na\nb\n...\nc", "a\nx\na\nb\nc"),
        ("lr: 1.2e-03  eta: 0:00:12  loss: 0.5", "lr: 4.0e-04  eta: 1:10:02  loss: 12"),
        ("about 4 min for 187 steps, 1.2 GB", "about 3 s for 2 steps, 20 MB"),
        ("│ a  │   12.0 │", "\x1b[1m│ a │ 1.0 │\x1b[0m"),
        ("report    /home/me/out/report.html", "report    /tmp/pytest-of-me/test0/out/report.html"),
    ],
)
def test_lines_that_agree(shown, printed):
    compare(shown, printed, "here")


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("a\n...\nb", "a\nb\nc"),
        ("a\n...\nb", "x\na\nb"),
        ("a\nb", "a\nx\nb"),
        ("a\n...\nb\nc", "a\nb\nx\nc"),
        ("", "a"),
        ("a", ""),
        ("a\na\n...\nb", "b"),
        ("lr: 1.2e-03  loss: 0.5", "lr: 4.0e-04  loss_sum: 12"),
        ("| row | seeds |", "| row | runs |"),
        ("runs/hgkd/epoch_1.pth", "runs/pixels/epoch_1.pth"),
    ],
)
def test_lines_that_differ(shown, printed):
    with pytest.raises(PageDiffersError, match=r"^here: "):
        compare(shown, printed, "here")


def test_words_that_are_results():
    compare("worst class: star 3.0", "worst class: ring 12.5", "here", values=("ring", "star"))
    with pytest.raises(PageDiffersError, match=r"^here: "):
        compare("worst class: star 3.0", "worst class: starfish 3.0", "here", values=("ring", "star"))
