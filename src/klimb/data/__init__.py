"""Rows → tokens and masks. The one place that decides what is trained on.

readers (files of any format → rows and their places) → formats (checked, columns by our names) → shapes (what others
write differently) → kinds (what type of data they are) → template (text, and whose words they are) → encode (ids that
no text can forge) → render (tokens and mask) → load (what a stage trains on) → store (in a file, mapped into memory),
found again by cache, several of them as one by mix, described by report; sampler says in which order. Nothing here
needs torch.
"""
