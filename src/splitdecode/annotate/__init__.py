"""F7: from traces to tagged traces: who finds the hard parts of a reasoning trace, and a file that survives a crash.

    traces    what is to be annotated: JSON lines, a directory saved by `datasets`, or synthetic families
    spans     ranges of characters, and a text with control tags around them
    records   what an annotator is, and the line it becomes
    output    the file of finished lines       run     traces through an annotator into that file
    rules     synthetic traces by their own structure
    gap       where the small model loses most against the large one: no third model
    endpoint  any OpenAI-compatible server, asked for verbatim snippets (snippets, align, client, limits)
    report    statistics of such a file, agreement of two

Importing this loads neither httpx nor rapidfuzz nor datasets.
"""
