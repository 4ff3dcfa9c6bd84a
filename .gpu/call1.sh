cd .gpu
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site whl/*.whl
export PYTHONPATH=$PWD/src:$PWD:/tmp/site PYTHONUNBUFFERED=1
t0=$(date +%s); lap() { echo "### $1 at $(( $(date +%s) - t0 ))s"; }
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
timeout 150 python3 -m pytest tests/parity/test_triton_*.py tests/parity/test_graph_runner.py -q -n 8 -p no:cacheprovider 2>&1 | tail -60 > $OUT/tests.txt; tail -25 $OUT/tests.txt
lap tests
timeout 90 python3 -m benchmarks.generate --model qwen3-0.6b --cases 1x128/256 1x4096/1 16x128/256 64x512/128 --record --results $OUT --commit c1 2>&1 | tail -20
lap generate
timeout 100 python3 -m benchmarks.kernels --what linear decode prefill --models qwen3-0.6b --record --results $OUT --commit c1 2>&1 | tail -50
lap kernels
