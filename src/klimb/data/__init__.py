"""Rows → tokens and masks. The one place that decides what is trained on.

formats (rows and their places) → kinds (what type of data they are) → template (text, and whose words they are)
→ encode (ids that no text can forge) → render (tokens and mask) → load (lists for a stage, with a report);
sampler says in which order. Nothing here needs torch.
"""
