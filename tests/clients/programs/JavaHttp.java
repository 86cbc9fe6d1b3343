// Java's own client, which offers HTTP/2 (`Upgrade: h2c`) with every request, as LangChain4j and Spring
// AI send it. Prints one JSON line for each call, see common.py. Run as `java JavaHttp.java ...`.
import java.io.ByteArrayInputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.List;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

public class JavaHttp {
  static final HttpClient CLIENT = HttpClient.newHttpClient(); // its default is HTTP/2
  static final String TOOL = """
      {"type": "function", "function": {"name": "get_weather",
       "description": "Get the weather in a city", "parameters": {"type": "object",
       "properties": {"city": {"type": "string"}}, "required": ["city"]}}}""";
  static final String USER = "{\"role\": \"user\", \"content\": \"%s\"}";
  static final String CAPITAL = USER.formatted("What is the capital of Felonia?");
  static final String WEATHER = USER.formatted("What is the weather in Nemoburg?");
  static String base;
  static String model;
  static String key;

  static String body(String model, String messages, String more) {
    return "{\"model\": \"%s\", \"messages\": [%s], \"temperature\": 0, \"max_tokens\": 60%s}"
        .formatted(model, messages, more);
  }

  static HttpRequest.Builder to(String path, String key) {
    return HttpRequest.newBuilder(URI.create(base + path)).timeout(Duration.ofSeconds(60))
        .header("Authorization", "Bearer " + key).header("Content-Type", "application/json");
  }

  static HttpResponse<String> post(BodyPublisher body, String key) throws Exception {
    return CLIENT.send(to("/chat/completions", key).POST(body).build(), BodyHandlers.ofString());
  }

  static HttpResponse<String> post(String body) throws Exception {
    return post(BodyPublishers.ofString(body), key);
  }

  static String expect(HttpResponse<String> answer, int status) throws Exception {
    if (answer.statusCode() != status) {
      throw new Exception("status " + answer.statusCode() + ": " + answer.body());
    }
    return answer.body();
  }

  static String found(String text, String pattern) throws Exception {
    Matcher matcher = Pattern.compile(pattern).matcher(text);
    if (!matcher.find()) throw new Exception("nothing like " + pattern + " in " + text);
    return matcher.group(1);
  }

  static String quoted(String text) {
    return "\"" + text.substring(0, Math.min(600, text.length())).replace("\\", "\\\\")
        .replace("\"", "\\\"").replaceAll("\\s+", " ") + "\"";
  }

  static String text(String body) throws Exception {
    return "{\"text\": " + quoted(found(body, "\"content\": ?\"((?:[^\"\\\\]|\\\\.)+)\"")) + "}";
  }

  static String refused(HttpResponse<String> answer, int status) throws Exception {
    return "{\"status\": " + status + ", \"message\": " + quoted(expect(answer, status)) + "}";
  }

  static String run(String call) throws Exception {
    switch (call) {
      case "chat": // twice: the second goes over the connection that the first has used
        post(body(model, CAPITAL, ""));
        return text(expect(post(body(model, CAPITAL, "")), 200));
      case "chunked": // of unknown length, so Transfer-Encoding: chunked
        byte[] bytes = body(model, CAPITAL, "").getBytes(StandardCharsets.UTF_8);
        BodyPublisher later = BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(bytes));
        return text(expect(post(later, key), 200));
      case "stream":
        String more = ", \"stream\": true, \"stream_options\": {\"include_usage\": true}";
        HttpRequest asked = to("/chat/completions", key)
            .POST(BodyPublishers.ofString(body(model, CAPITAL, more))).build();
        List<String> lines = CLIENT.send(asked, BodyHandlers.ofLines()).body().toList();
        long events = lines.stream().filter(line -> line.startsWith("data: {")).count();
        String all = String.join("\n", lines);
        if (events < 3 || !all.contains("data: [DONE]")) throw new Exception(all);
        return "{\"events\": %d, \"completion_tokens\": %s}"
            .formatted(events, found(all, "\"completion_tokens\": ?([1-9][0-9]*)"));
      case "tools": // the answer's own message goes back, as text
        String forced = ", \"tools\": [" + TOOL + "], \"tool_choice\": \"required\"";
        String first = expect(post(body(model, WEATHER, forced)), 200);
        String message = found(first, "\"message\": ?(\\{.*\\}) ?, ?\"(?:logprobs|finish_reason)\"");
        String id = found(message, "\"id\": ?\"([^\"]+)\"");
        String result = "{\"role\": \"tool\", \"tool_call_id\": \"%s\", \"content\": \"%s\"}"
            .formatted(id, "clear, 18 degrees");
        String history = WEATHER + ", " + message + ", " + result;
        return text(expect(post(body(model, history, ", \"tools\": [" + TOOL + "]")), 200));
      case "wrong_key":
        return refused(post(BodyPublishers.ofString(body(model, CAPITAL, "")), "sk-wrong-key-1"), 401);
      case "unknown_model":
        return refused(post(body("no-such-model", CAPITAL, "")), 404);
      case "too_long":
        String much = USER.formatted("The capital of Felonia is a town on the river. ".repeat(500));
        HttpResponse<String> answer = post(body(model, much, ""));
        found(answer.body(), "(maximum context length)");
        return refused(answer, 400);
      case "models":
        HttpRequest listed = to("/models", key).GET().build();
        String names = expect(CLIENT.send(listed, BodyHandlers.ofString()), 200);
        return "{\"model\": " + quoted(found(names, "\"id\": ?\"([^\"]+)\"")) + "}";
      default:
        throw new Exception("no such call: " + call);
    }
  }

  public static void main(String[] arguments) {
    base = arguments[0];
    model = arguments[1];
    key = arguments[2];
    for (int at = 3; at < arguments.length; at++) {
      String call = quoted(arguments[at]);
      try {
        String seen = run(arguments[at]);
        System.out.println("{\"call\": " + call + ", \"ok\": true, \"seen\": " + seen + "}");
      } catch (Exception error) {
        String told = quoted(error.getClass().getSimpleName() + ": " + error.getMessage());
        System.out.println("{\"call\": " + call + ", \"ok\": false, \"error\": " + told + "}");
      }
    }
  }
}
