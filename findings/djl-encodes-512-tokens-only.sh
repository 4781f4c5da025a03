#!/usr/bin/env bash
# DJL (Java): encode returns the first 512 tokens of a text, whatever the tokenizer is
#
# Expected: encode gives all tokens, as tokenizers does in Python and Rust for the same tokenizer.json, whose
#   `truncation` is null. A limit belongs to the model.
# Happens:  HuggingFaceTokenizer.newInstance(path) truncates at 512 (a limit of BERT's), also for a
#   byte-level BPE; half of a page is missing, and counts of tokens end at 512. A warning goes to slf4j,
#   which prints nothing unless a binding is installed, and does not say that text was cut.
#   Map.of("truncation", "false") gives all.
#
# Versions: ai.djl.huggingface:tokenizers 0.38.0 (Java 17), tokenizers 0.23.3 (Python 3.11). Seen: 2026-11-30.
# Needs: bash, uv, java 17 or newer, mvn.
#
# Output seen:
#   Python: 2000 tokens
#   Java, default: 512 tokens
#   Java, truncation=false: 2000 tokens
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python tokenizers==0.23.3
cat > pom.xml <<'XML'
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>finding</groupId>
  <artifactId>finding</artifactId>
  <version>1</version>
  <dependencies>
    <dependency>
      <groupId>ai.djl.huggingface</groupId>
      <artifactId>tokenizers</artifactId>
      <version>0.38.0</version>
    </dependency>
  </dependencies>
</project>
XML
mvn -q -B -Dmaven.repo.local="$work/repository" dependency:copy-dependencies -DoutputDirectory="$work/jars" > mvn.log 2>&1 ||
  { cat mvn.log; exit 2; }
cat > try.py <<'PYTHON'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.save("tokenizer.json")
print(f"Python: {len(tokenizer.encode('word ' * 400).ids)} tokens")
PYTHON
cat > Try.java <<'JAVA'
import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer;
import java.nio.file.Path;
import java.util.Map;

public class Try {
    static int count(Map<String, String> options) throws Exception {
        try (HuggingFaceTokenizer tokenizer = HuggingFaceTokenizer.newInstance(Path.of("tokenizer.json"), options)) {
            return tokenizer.encode("word ".repeat(400)).getIds().length;
        }
    }

    public static void main(String[] args) throws Exception {
        System.out.println("Java, default: " + count(Map.of()) + " tokens");
        System.out.println("Java, truncation=false: " + count(Map.of("truncation", "false")) + " tokens");
    }
}
JAVA
venv/bin/python try.py | tee seen.txt
DJL_CACHE_DIR="$work/cache" OPT_OUT_TRACKING=true java -cp "jars/*" Try.java 2> java.log | tee -a seen.txt
cat > as_seen.txt <<'TEXT'
Python: 2000 tokens
Java, default: 512 tokens
Java, truncation=false: 2000 tokens
TEXT
cmp seen.txt as_seen.txt
