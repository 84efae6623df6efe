"""The table of families counts what a run of tests says."""

from benchmarks.families import counted

REPORT = """<testsuites><testsuite>
<testcase classname="tests.models.test_bert" name="a"/>
<testcase classname="tests.models.test_bert" name="b"><failure message="x"/></testcase>
<testcase classname="tests.models.test_bert" name="c"><skipped/></testcase>
<testcase classname="tests.models.test_bert_two" name="d"/>
<testcase classname="tests.models.test_vit" name="e"><error/></testcase>
</testsuite></testsuites>"""


def test_only_the_files_of_a_family_count(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    assert counted(tmp_path / "report.xml", ("test_bert",)) == (1, 1)
    assert counted(tmp_path / "report.xml", ("test_bert_two", "test_vit")) == (1, 1)
    assert counted(tmp_path / "report.xml", ()) == (0, 0)
