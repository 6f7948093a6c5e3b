import java.io.IOException;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.function.Consumer;
import java.util.stream.Stream;

/**
 * A client of a lepton_xla server for Java 11 and later, without dependencies: the Open Inference Protocol with binary
 * tensors, and generation of text as a stream of server-sent events. Thread-safe. Other languages need the same steps.
 */
public final class LeptonClient {
    /** What the server refused, or what was no answer. */
    public static final class LeptonException extends IOException {
        private static final long serialVersionUID = 1;
        /** HTTP status; 0 for an answer that is none. */
        public final int status;

        LeptonException(int status, String message) {
            super(message);
            this.status = status;
        }
    }

    /** A named array. Its bytes are little-endian, rows first. */
    public static final class Tensor {
        public final String name;
        public final String datatype;
        public final long[] shape;
        private final ByteBuffer data;

        private Tensor(String name, String datatype, long[] shape, ByteBuffer data) {
            this.name = name;
            this.datatype = datatype;
            this.shape = shape;
            this.data = data.order(ByteOrder.LITTLE_ENDIAN);
        }

        public static Tensor of(String name, float[] values, long... shape) {
            Tensor made = new Tensor(name, "FP32", shape, ByteBuffer.allocate(4 * values.length));
            made.data.asFloatBuffer().put(values);
            return made.checked(values.length);
        }

        public static Tensor of(String name, int[] values, long... shape) {
            Tensor made = new Tensor(name, "INT32", shape, ByteBuffer.allocate(4 * values.length));
            made.data.asIntBuffer().put(values);
            return made.checked(values.length);
        }

        private Tensor checked(long count) {
            long size = 1;
            for (long dimension : shape) size = Math.multiplyExact(size, dimension);
            if (size != count) throw new IllegalArgumentException(name + " has " + count + " values, its shape " + size);
            return this;
        }

        /** The values of an FP32 tensor. */
        public float[] floats() {
            if (!datatype.equals("FP32")) throw new IllegalStateException(name + " is " + datatype + ", not FP32");
            float[] values = new float[data.remaining() / 4];
            data.duplicate().order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer().get(values);
            return values;
        }

        /** The values of an INT32 tensor. */
        public int[] ints() {
            if (!datatype.equals("INT32")) throw new IllegalStateException(name + " is " + datatype + ", not INT32");
            int[] values = new int[data.remaining() / 4];
            data.duplicate().order(ByteOrder.LITTLE_ENDIAN).asIntBuffer().get(values);
            return values;
        }
    }

    private final HttpClient http = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
    private final String url;
    private final String token;
    private final Duration timeout;

    /** A client of the server at a URL; the token may be null, the timeout is that of a request's first answer. */
    public LeptonClient(String url, String token, Duration timeout) {
        this.url = url.endsWith("/") ? url.substring(0, url.length() - 1) : url;
        this.token = token;
        this.timeout = timeout;
    }

    /** Runs a model; gives its outputs by name. */
    public Map<String, Tensor> infer(String model, Tensor... inputs) throws IOException, InterruptedException {
        List<Object> described = new ArrayList<>();
        int bytes = 0;
        for (Tensor input : inputs) {
            List<Object> shape = new ArrayList<>();
            for (long dimension : input.shape) shape.add(dimension);
            described.add(Map.of("name", input.name, "datatype", input.datatype, "shape", shape,
                "parameters", Map.of("binary_data_size", input.data.remaining())));
            bytes += input.data.remaining();
        }
        byte[] head = Json.write(Map.of("inputs", described, "parameters", Map.of("binary_data_output", true)))
            .getBytes(StandardCharsets.UTF_8);
        ByteBuffer body = ByteBuffer.allocate(head.length + bytes).put(head);
        for (Tensor input : inputs) body.put(input.data.duplicate());
        HttpResponse<byte[]> answer = http.send(
            request("/v2/models/" + model + "/infer", body.array())
                .header("Inference-Header-Content-Length", String.valueOf(head.length)).build(),
            HttpResponse.BodyHandlers.ofByteArray());
        if (answer.statusCode() != 200) throw refused(answer.statusCode(), new String(answer.body(), StandardCharsets.UTF_8));
        int size = answer.headers().firstValue("Inference-Header-Content-Length").map(Integer::parseInt)
            .orElse(answer.body().length);
        Map<?, ?> told = (Map<?, ?>) Json.read(new String(answer.body(), 0, size, StandardCharsets.UTF_8));
        Map<String, Tensor> outputs = new LinkedHashMap<>();
        for (Object each : (List<?>) told.get("outputs")) {
            Map<?, ?> output = (Map<?, ?>) each;
            List<?> dimensions = (List<?>) output.get("shape");
            long[] shape = dimensions.stream().mapToLong(value -> ((Number) value).longValue()).toArray();
            int count = ((Number) ((Map<?, ?>) output.get("parameters")).get("binary_data_size")).intValue();
            ByteBuffer data = ByteBuffer.wrap(answer.body(), size, count).slice();
            String name = (String) output.get("name");
            outputs.put(name, new Tensor(name, (String) output.get("datatype"), shape, data));
            size += count;
        }
        return outputs;
    }

    /**
     * Continues a text, and gives each piece of the new text as it comes.
     *
     * @param parameters such as "max_tokens", "temperature", "seed" and "stop"
     * @return why it ended: "stop" or "length"
     */
    public String generate(String model, String text, Map<String, ?> parameters, Consumer<String> piece)
            throws IOException, InterruptedException {
        byte[] body = Json.write(Map.of("text_input", text, "parameters", parameters)).getBytes(StandardCharsets.UTF_8);
        HttpRequest request = request("/v2/models/" + model + "/generate_stream", body).build();
        HttpResponse<Stream<String>> answer = http.send(request, HttpResponse.BodyHandlers.ofLines());
        // Closing the lines early closes the connection, and the server frees the slot.
        try (Stream<String> lines = answer.body()) {
            if (answer.statusCode() != 200) {
                StringBuilder said = new StringBuilder();
                lines.forEach(said::append);
                throw refused(answer.statusCode(), said.toString());
            }
            for (Iterator<String> each = lines.iterator(); each.hasNext();) {
                String line = each.next();
                if (!line.startsWith("data:")) continue;
                Map<?, ?> event = (Map<?, ?>) Json.read(line.substring(5).trim());
                if (event.containsKey("error")) throw new LeptonException(500, String.valueOf(event.get("error")));
                Object said = event.get("text_output");
                if (said != null && !said.equals("")) piece.accept((String) said);
                Object details = event.get("details");
                if (details != null) return String.valueOf(((Map<?, ?>) details).get("finish_reason"));
            }
        }
        throw new LeptonException(0, "the stream ended before the text did");
    }

    private HttpRequest.Builder request(String path, byte[] body) {
        HttpRequest.Builder made = HttpRequest.newBuilder(URI.create(url + path)).timeout(timeout)
            .POST(HttpRequest.BodyPublishers.ofByteArray(body));
        return token == null ? made : made.header("Authorization", "Bearer " + token);
    }

    private static LeptonException refused(int status, String body) {
        String message = body;
        try {
            Object said = Json.read(body);
            if (said instanceof Map) message = String.valueOf(((Map<?, ?>) said).get("error"));
        } catch (IllegalArgumentException notJson) {
            // The body is the message.
        }
        return new LeptonException(status, "HTTP " + status + ": " + message);
    }

    /** As much JSON as the protocol needs: maps, lists, strings, numbers, booleans, null. */
    static final class Json {
        private final String text;
        private int at;

        private Json(String text) {
            this.text = text;
        }

        static Object read(String text) {
            Json reader = new Json(text);
            Object value = reader.value();
            if (reader.peek() != 0) throw reader.wrong();
            return value;
        }

        static String write(Object value) {
            StringBuilder out = new StringBuilder();
            write(value, out);
            return out.toString();
        }

        private static void write(Object value, StringBuilder out) {
            if (value instanceof Map) {
                String before = "{";
                for (Map.Entry<?, ?> entry : ((Map<?, ?>) value).entrySet()) {
                    out.append(before);
                    write(String.valueOf(entry.getKey()), out);
                    out.append(':');
                    write(entry.getValue(), out);
                    before = ",";
                }
                out.append(before.equals("{") ? "{}" : "}");
            } else if (value instanceof List) {
                String before = "[";
                for (Object each : (List<?>) value) {
                    out.append(before);
                    write(each, out);
                    before = ",";
                }
                out.append(before.equals("[") ? "[]" : "]");
            } else if (value instanceof String) {
                out.append('"');
                for (char c : ((String) value).toCharArray()) {
                    if (c == '"' || c == '\\') out.append('\\').append(c);
                    else if (c < ' ' || Character.isSurrogate(c)) out.append(String.format("\\u%04x", (int) c));
                    else out.append(c);
                }
                out.append('"');
            } else {
                out.append(value);
            }
        }

        private char peek() {
            while (at < text.length() && text.charAt(at) <= ' ') at++;
            return at < text.length() ? text.charAt(at) : 0;
        }

        private boolean skip(char wanted) {
            if (peek() != wanted) return false;
            at++;
            return true;
        }

        private IllegalArgumentException wrong() {
            return new IllegalArgumentException("no JSON at character " + at);
        }

        private Object value() {
            if (skip('{')) {
                Map<String, Object> map = new LinkedHashMap<>();
                if (skip('}')) return map;
                do {
                    if (peek() != '"') throw wrong();
                    String name = string();
                    if (!skip(':')) throw wrong();
                    map.put(name, value());
                } while (skip(','));
                if (!skip('}')) throw wrong();
                return map;
            }
            if (skip('[')) {
                List<Object> list = new ArrayList<>();
                if (skip(']')) return list;
                do list.add(value()); while (skip(','));
                if (!skip(']')) throw wrong();
                return list;
            }
            if (peek() == '"') return string();
            int start = at;
            while (at < text.length() && ",]} \t\r\n".indexOf(text.charAt(at)) < 0) at++;
            String word = text.substring(start, at);
            if (word.equals("true") || word.equals("false")) return word.equals("true");
            if (word.equals("null")) return null;
            try {
                if (word.matches("-?\\d+")) return Long.parseLong(word);
                return Double.parseDouble(word);
            } catch (NumberFormatException notANumber) {
                throw wrong();
            }
        }

        private String string() {
            StringBuilder out = new StringBuilder();
            for (at++; at < text.length(); at++) {
                char c = text.charAt(at);
                if (c == '"') {
                    at++;
                    return out.toString();
                }
                if (c != '\\') {
                    out.append(c);
                    continue;
                }
                if (++at >= text.length()) break;
                int known = "bfnrt".indexOf(text.charAt(at));
                if (text.charAt(at) == 'u') {
                    if (at + 4 >= text.length()) break;
                    out.append((char) Integer.parseInt(text.substring(at + 1, at + 5), 16));
                    at += 4;
                } else {
                    out.append(known < 0 ? text.charAt(at) : "\b\f\n\r\t".charAt(known));
                }
            }
            throw wrong();
        }
    }
}
