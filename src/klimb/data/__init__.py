"""Rows → tokens and masks. The one place that decides what is trained on.

source (what a source of rows is) → readers, tables (files of any format → rows and their places) → formats (checked,
columns by our names) → shapes (what others write differently) → kinds (what type of data they are; checks: what a
column has to hold) → template (text, and whose words they are; sandbox: what a template may cost) → encode (ids that
no text can forge) → render (tokens and mask) → load (what a stage trains on) → store (in a file, mapped into memory),
found again by cache, several of them as one by mix, described by report; sampler says in which order. Nothing here
needs torch.
"""
