import java.time.Duration;
import java.util.Arrays;
import java.util.Map;

/** Runs a model, or continues a text: `java Example URL MODEL INPUT 1,2,3` or `java Example URL MODEL "some text"`. */
public final class Example {
    public static void main(String[] arguments) throws Exception {
        LeptonClient client = new LeptonClient(arguments[0], System.getenv("LEPTON_TOKEN"), Duration.ofSeconds(30));
        try {
            if (arguments.length == 3) {
                String why = client.generate(arguments[1], arguments[2], Map.of("max_tokens", 8), System.out::println);
                System.out.println("ended by " + why);
                return;
            }
            String[] given = arguments[3].split(",");
            float[] row = new float[given.length];
            for (int i = 0; i < row.length; i++) row[i] = Float.parseFloat(given[i]);
            LeptonClient.Tensor input = LeptonClient.Tensor.of(arguments[2], row, 1, row.length);
            client.infer(arguments[1], input).forEach((name, output) ->
                System.out.println(name + Arrays.toString(output.shape) + " = " + Arrays.toString(output.floats())));
        } catch (LeptonClient.LeptonException refusal) {
            System.err.println(refusal.getMessage());
            System.exit(1);
        }
    }
}
