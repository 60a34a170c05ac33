"""What the paper printed, to stand beside our tables.  Gong et al., Findings of ACL 2023; 4-bit weights, 8-bit
activations, GLUE's validation sets.
"""

PAPER: dict[str, str] = {
    "table1": """
| average of 8 tasks (trained) | FT | PTQ | QAT | PreQuant |
|---|---|---|---|---|
| BERT-base | 83.1 (85 M) | 72.4 | 82.6 | 81.9 (0.55 M) |
| RoBERTa-base | 86.4 (85 M) | 75.7 | 85.3 | 84.9 (0.55 M) |
| RoBERTa-large | 88.9 (302 M) | 76.7 | 87.9 | 87.6 (1.47 M) |
| T5-3B encoder | 89.2 (1.2 B) | 78.6 | 88.6 | 88.5 (11.80 M) |
""",
    "table2": """
| RoBERTa-large, average | score | trained |
|---|---|---|
| Quadapter, 8 bit | 85.1 | |
| AlphaTuning, 4 bit | 86.3 | 1.18 M |
| PreQuant-alpha, 4 bit | 86.6 | 0.29 M |
| PreQuant, 4 bit | 87.6 | 1.47 M |
""",
    "table3": """
| RoBERTa-large | CoLA | MRPC | STS-B | MNLI | L2 error |
|---|---|---|---|---|---|
| min_max | 15.6 | 77.6 | 84.5 | 79.6 | 163.1 |
| outlier_aware | 67.3 | 89.0 | 90.8 | 89.4 | 59.5 |
| mse | 67.8 | 89.8 | 90.9 | 89.5 | 42.6 |
| row_wise | 68.0 | 90.0 | 91.3 | 89.7 | 41.7 |
""",
    "table4": """
| RoBERTa-large | r = 1 | 3 | 5 | 10 | 20 | 512 | 1024 | FT |
|---|---|---|---|---|---|---|---|---|
| QNLI | 86.5 | 93.2 | 93.2 | 93.3 | 93.6 | 92.8 | 92.9 | 94.7 |
| MRPC | 80.5 | 88.8 | 89.0 | 89.1 | 89.4 | 90.2 | 90.3 | 90.9 |
""",
    "table5": """
| T5 encoder | all 4 bit | 2 bits on the bottom third | bottom two thirds | top third | top two thirds |
|---|---|---|---|---|---|
| QNLI | 95.1 | 84.9 | 82.4 | 92.3 | 84.7 |
| STS-B | 91.6 | 75.0 | 59.5 | 89.6 | 85.4 |
""",
    "table6": """
| T5 encoder, MNLI | 2k rows | 4k | 6k | 8k | all |
|---|---|---|---|---|---|
| FT | 86.6 | 87.3 | 88.2 | 88.4 | 91.2 |
| PreQuant | 83.2 | 85.9 | 87.4 | 87.8 | 90.7 |
""",
}
