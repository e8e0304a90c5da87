#!/bin/bash
@DIRECTIVES@

# Written by megatron-ext: one of its commands, after the jobs that it is about.

cd @WORK_DIR@ || exit 1
exec srun @SRUN_OPTIONS@ @CONTAINER@ @PYTHON@ -m megatron_ext @ARGUMENTS@
